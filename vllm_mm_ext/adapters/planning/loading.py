"""Loads of a model what needs no weights: its configuration and its processor, as they serve."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_mm_ext.adapters.live.served_template import renderer_of
from vllm_mm_ext.adapters.names.names_check import problem
from vllm_mm_ext.adapters.names.planning_names import PLANNING_NAMES
from vllm_mm_ext.adapters.processors.model_traits import read_traits
from vllm_mm_ext.media.traits import ModelTraits

# vLLM wants to know a size of the KV cache; nothing is allocated.
_NO_MATTER_BYTES = 1 << 30


class CannotPlanError(ValueError):
    """The planner cannot work with a model; the message says why."""


@dataclass(frozen=True)
class LoadedModel:
    """A model without its weights.

    Attributes:
        config: vLLM's ``VllmConfig``.
        processor: vLLM's multimodal processor, the plugin's for the families it knows.
        traits: What the model wants from the front-end.
        mm_processor_kwargs: vLLM's ``--mm-processor-kwargs``.
    """

    config: Any
    processor: Any
    traits: ModelTraits
    mm_processor_kwargs: Mapping[str, Any]

    @contextmanager
    def naming_kwargs(self) -> Iterator[None]:
        """Say of what fails in the processor that ``--mm-processor-kwargs`` may be why.

        Processors check few of its values, and fail by them when they make something of media.

        Raises:
            CannotPlanError: There are such values, and the processor failed.
        """
        try:
            yield
        except CannotPlanError:
            raise
        except Exception as error:
            if not self.mm_processor_kwargs:
                raise
            raise CannotPlanError(
                f"--mm-processor-kwargs {json.dumps(dict(self.mm_processor_kwargs))}: the model's "
                f"processor fails with it: {type(error).__name__}: {_first_line(error)}"
            ) from error

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.processor.info.get_tokenizer()

    def template_tokens(self, media: Sequence[str]) -> int:
        """Tokens of a conversation of one message with these media and no text.

        Args:
            media: Modality of each medium.
        """
        return len(self.tokenizer.encode(self.conversation(media, ""), add_special_tokens=False))

    def conversation(self, media: Sequence[str], text: str) -> str:
        """A conversation of one message as the chat template writes it.

        Args:
            media: Modality of each medium.
            text: What stands after the media.
        """
        chat = SimpleNamespace(
            chat_template=None, chat_template_content_format="auto", default_chat_template_kwargs={}
        )
        render = renderer_of(chat, self.config.model_config, self.tokenizer)
        parts = [{"type": kind} for kind in media]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        return render([message], True)


def load(
    model: str,
    *,
    context: int | None,
    mm_processor_kwargs: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> LoadedModel:
    """Load a model without its weights, with the plugin's processors where it is registered.

    Args:
        model: Folder of its files, or its name.
        context: Tokens of its context; None for what the model allows.
        mm_processor_kwargs: vLLM's ``--mm-processor-kwargs``.
        settings: The plugin's settings, ``additional_config.mm_ext``.

    Raises:
        CannotPlanError: vLLM does not serve the model, takes no media with it, or has changed.
    """
    if (changed := problem(PLANNING_NAMES)) is not None:
        raise CannotPlanError(f"this vLLM is not as the planner needs it: {changed}")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    try:
        config = EngineArgs(
            model=model,
            max_model_len=context,
            mm_processor_kwargs=dict(mm_processor_kwargs) or None,
            additional_config={"mm_ext": dict(settings)},
            kv_cache_memory_bytes=_NO_MATTER_BYTES,
            enforce_eager=True,
            load_format="dummy",
        ).create_engine_config()
    except Exception as error:
        hint = "" if Path(model).is_dir() else "; MODEL may also be a folder with the model's files"
        raise CannotPlanError(f"vLLM does not load {model}: {_first_line(error)}{hint}") from error
    if not config.model_config.is_multimodal_model:
        raise CannotPlanError(f"{model} takes no media: there is nothing to plan for")
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    return LoadedModel(config, processor, read_traits(processor), mm_processor_kwargs)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
