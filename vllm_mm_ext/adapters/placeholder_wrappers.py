"""Wrappers around vLLM's rendering that keep text of clients from standing for media."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm_mm_ext.adapters.patches import wrap
from vllm_mm_ext.request.conversation import list_contents
from vllm_mm_ext.request.placeholder_text import (
    MARK,
    is_marked,
    marked,
    marked_arguments,
    unmarked,
)

MODALITIES = ("image", "video", "audio")


def install() -> None:
    """Wrap rendering and tokenizing. Idempotent."""
    from vllm.renderers import hf
    from vllm.renderers.base import BaseRenderer

    wrap(BaseRenderer, "render_chat_async", _marking_async)
    wrap(BaseRenderer, "render_chat", _marking)
    wrap(BaseRenderer, "_tokenize_prompt", _in_parts)
    wrap(hf, "safe_apply_chat_template", _templated_in_parts)


def placeholders_of(mm_processor: Any) -> list[str]:
    """The special tokens that stand in a prompt for media.

    Args:
        mm_processor: vLLM's ``BaseMultiModalProcessor`` of the served model, or None.
    """
    if mm_processor is None:
        return []
    info = mm_processor.info
    processor, config, tokenizer = (
        info.get_hf_processor(),
        info.get_hf_config(),
        info.get_tokenizer(),
    )
    found = [getattr(processor, f"{name}_token", None) for name in MODALITIES]
    ids = [
        getattr(config, f"{name}_token_{kind}", None)
        for name in MODALITIES
        for kind in ("id", "index")
    ]
    ids += [getattr(mm_processor, name, None) for name in ("video_token_id", "sound_token_id")]
    found += [tokenizer.decode([token]) for token in ids if isinstance(token, int)]
    return sorted({str(text) for text in found if text and len(str(text)) > 1})


def _marking_async(original: Callable[..., Any]) -> Callable[..., Any]:
    async def render_chat_async(
        self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        made, params = _marked(self, conversations, chat_params)
        rendered = await original(self, made, params, *args, **kwargs)
        return rendered if params is chat_params else (unmarked(rendered[0]), rendered[1])

    return render_chat_async


def _marking(original: Callable[..., Any]) -> Callable[..., Any]:
    def render_chat(
        self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        made, params = _marked(self, conversations, chat_params)
        rendered = original(self, made, params, *args, **kwargs)
        return rendered if params is chat_params else (unmarked(rendered[0]), rendered[1])

    return render_chat


def _marked(
    renderer: Any, conversations: Sequence[Any], chat_params: Any
) -> tuple[Sequence[Any], Any]:
    """The conversations with marks, and parameters by which the template makes text of them."""
    from vllm.utils.mistral import is_mistral_tokenizer

    if is_mistral_tokenizer(renderer.tokenizer):
        # These tokenizers take messages apart by themselves, and make no tokens of markup.
        return conversations, chat_params
    template = chat_params.chat_template_kwargs
    placeholders = placeholders_of(renderer.mm_processor)
    for messages in conversations if placeholders else ():
        list_contents(messages)
    made = [marked(messages, placeholders) for messages in conversations]
    arguments = marked_arguments(template, placeholders)
    unchanged = all(new is old for new, old in zip(made, conversations, strict=True))
    if unchanged and arguments == template:
        return conversations, chat_params
    return made, replace(chat_params, chat_template_kwargs={**arguments, "tokenize": False})


def _in_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    def _tokenize_prompt(self: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if MARK not in prompt["prompt"]:
            return original(self, prompt, params, *args, **kwargs)
        first, *others = prompt["prompt"].split(MARK)
        made = original(self, {**prompt, "prompt": first}, params, *args, **kwargs)
        ids = list(made["prompt_token_ids"])
        later = replace(params, add_special_tokens=False)
        for text in filter(None, others):
            part = original(self, {**prompt, "prompt": text}, later, *args, **kwargs)
            ids += part["prompt_token_ids"]
        # Offsets, which vLLM may leave out, would be those of the first part alone.
        made.pop("prompt_token_offsets", None)
        return {**made, "prompt": unmarked(prompt["prompt"]), "prompt_token_ids": ids}

    return _tokenize_prompt


def _templated_in_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    def safe_apply_chat_template(
        model_config: Any,
        tokenizer: Any,
        conversation: Any,
        *,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        # vLLM has tokens made here, whatever it is asked, where a message has ``prompt_embeds``.
        if not tokenize or not (is_marked(conversation) or is_marked(kwargs)):
            return original(model_config, tokenizer, conversation, tokenize=tokenize, **kwargs)
        text = original(model_config, tokenizer, conversation, tokenize=False, **kwargs)
        parts = filter(None, text.split(MARK))
        return [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]

    return safe_apply_chat_template
