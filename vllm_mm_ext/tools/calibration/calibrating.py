"""``vllm-mm calibrate``: serves a model, measures, and says what work costs."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from vllm_mm_ext.planner.calibration_file import VERSION, Calibration
from vllm_mm_ext.planner.delivery import Delivery
from vllm_mm_ext.planner.model_facts import ModelFacts
from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.workload import Workload
from vllm_mm_ext.testing.server import KV_CACHE_BYTES
from vllm_mm_ext.tools.calibration.measuring import Limits, observe, timed_server
from vllm_mm_ext.tools.calibration.observations import Fitted, fitted

# Room for the requests of a calibration, which has no more tokens in the engine at a time.
_CONTEXT = 8192
_SLOTS = 16
_CONTEXTS_OF_KV = 3


@dataclass(frozen=True)
class Setting:
    """How a model is served while it is measured.

    Attributes:
        tp: ``--tensor-parallel-size``.
        context: ``--max-model-len``.
        slots: ``--max-num-seqs``.
        step_tokens: ``--max-num-batched-tokens``.
        modalities: Media that the server takes of those that the model does; None: all.
        mm_processor_kwargs: ``--mm-processor-kwargs``.
        settings: The plugin's, ``additional_config.mm_ext``.
        arguments: Arguments of ``vllm serve`` that are not among these.
        dtype: Type of weights and activations; ``auto``: the model's own.
    """

    tp: int
    context: int
    slots: int
    step_tokens: int
    modalities: frozenset[str] | None
    mm_processor_kwargs: dict[str, Any]
    settings: dict[str, Any]
    arguments: tuple[str, ...]
    dtype: str = "auto"

    @classmethod
    def usual(cls, *, is_cpu: bool) -> Setting:
        """What is usual.

        Args:
            is_cpu: The model runs on the CPU.
        """
        # How frames are chosen decides what is decoded; planning is for even choices.
        sampling = {"policy": "uniform", "fps": 1.0, "max_frames": 64}
        # Without instructions for bfloat16 a CPU converts operands, in small steps dearly.
        dtype = "float32" if is_cpu else "auto"
        cpu = ("--enforce-eager", "--dtype", dtype) if is_cpu else ()
        return cls(
            tp=1,
            context=_CONTEXT,
            slots=_SLOTS,
            step_tokens=2048 if is_cpu else 8192,
            modalities=None,
            mm_processor_kwargs={},
            settings={"media": {"sampling": sampling}},
            arguments=cpu,
            dtype=dtype,
        )

    @classmethod
    def of(cls, config: Path) -> Setting:
        """As a ``--config`` file says, in which all of this must be.

        Args:
            config: The file.

        Raises:
            ValueError: The file is no such file, or lacks something.
        """
        given = _read(config)
        wanted = ("max-model-len", "max-num-seqs", "max-num-batched-tokens", "limit-mm-per-prompt")
        if missing := [key for key in wanted if key not in given]:
            raise ValueError(f"{config} does not say {', '.join(missing)}")
        counts = given["limit-mm-per-prompt"]
        return cls(
            tp=int(given.get("tensor-parallel-size", 1)),
            context=int(given["max-model-len"]),
            slots=int(given["max-num-seqs"]),
            step_tokens=int(given["max-num-batched-tokens"]),
            modalities=frozenset(kind for kind, count in counts.items() if count),
            mm_processor_kwargs=given.get("mm-processor-kwargs", {}),
            settings=given.get("additional-config", {}).get("mm_ext", {}),
            arguments=("--config", str(config)),
            dtype=str(given.get("dtype", "auto")),
        )


def _read(config: Path) -> dict[str, Any]:
    """A ``--config`` file; values that are JSON in a string are read as well."""
    try:
        content = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} has no keys: it is no --config file of vllm serve")
    found = {}
    for key, value in content.items():
        is_json = isinstance(value, str) and value.lstrip().startswith("{")
        found[str(key).replace("_", "-")] = json.loads(value) if is_json else value
    return found


class Model:
    """A model whose requests can be counted, without its weights.

    Args:
        name: Its name or path.
        setting: How it is served.

    Raises:
        ModelFilesError: Files are missing.
        CannotPlanError: The plugin cannot count the model's requests.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        from vllm_mm_ext.adapters.planning.planner import Planner

        self.planner = Planner(
            name, mm_processor_kwargs=setting.mm_processor_kwargs, settings=setting.settings
        )
        sampling = self.planner.settings.media.sampling
        self._delivery = Delivery(
            sampling.max_frames,
            sampling.min_frames,
            frame_pixels=sampling.frame_pixels,
            reduction=self.planner.default_reduction,
        )
        self._served = setting.modalities
        self._counted: dict[Workload, RequestTokens] = {}

    @property
    def facts(self) -> ModelFacts:
        """Its sizes."""
        return self.planner.facts

    @property
    def modalities(self) -> frozenset[str]:
        """Media that it takes, as it is served."""
        supported = self.supported
        return supported if self._served is None else supported & self._served

    @property
    def supported(self) -> frozenset[str]:
        """Media that it can take."""
        return frozenset(self.planner.loaded.processor.info.get_supported_mm_limits())

    def tokens_of(self, workload: Workload) -> RequestTokens:
        """What a request becomes in the engine."""
        if workload not in self._counted:
            self._counted[workload] = self.planner.counter.request(workload, self._delivery)
        return self._counted[workload]


def server_arguments(model: Model, setting: Setting) -> list[str]:
    """Arguments of ``vllm serve``: one engine and one API server, of which an estimate is."""
    kv = model.facts.kv_bytes_per_token(setting.tp) * setting.context * _CONTEXTS_OF_KV
    kwargs = setting.mm_processor_kwargs
    # Of a kind that is not named, vLLM takes any number.
    counts = {kind: 4 * (kind in model.modalities) for kind in sorted(model.supported)}
    return [
        *setting.arguments,
        *("--tensor-parallel-size", str(setting.tp)),
        *("--data-parallel-size", "1", "--api-server-count", "1"),
        *("--max-model-len", str(setting.context)),
        *("--max-num-seqs", str(setting.slots)),
        *("--max-num-batched-tokens", str(setting.step_tokens)),
        *("--kv-cache-memory-bytes", str(max(KV_CACHE_BYTES, kv))),
        *("--limit-mm-per-prompt", json.dumps(counts)),
        *(("--mm-processor-kwargs", json.dumps(kwargs)) if kwargs else ()),
    ]


def calibrate(
    name: str,
    folder: Path,
    setting: Setting,
    env: Mapping[str, str] | None = None,
    cores: Collection[int] = (),
) -> Calibration:
    """Measure a model on this machine.

    Args:
        name: Its name or path.
        folder: Where media files are kept.
        setting: How it is served.
        env: More environment variables of the server.
        cores: Numbers of the cores that the server may use; none: all.

    Returns:
        What was measured.

    Raises:
        ModelFilesError: Files of the model are missing.
        CannotPlanError: The plugin cannot count the model's requests.
        ServerError: The model could not be served.
    """
    model = Model(name, setting)
    arguments = server_arguments(model, setting)
    config = {"mm_ext": setting.settings}
    with timed_server(name, folder, arguments, config, env, cores) as (server, log):
        hears = model.planner.loaded.traits.hears_video
        limits = Limits(model.modalities, bool(hears), setting.context, min(_SLOTS, setting.slots))
        seen = asyncio.run(observe(server, log, folder, limits, model.tokens_of))
    return calibration(name, model.facts, setting, fitted(seen, model.tokens_of))


def calibration(name: str, facts: ModelFacts, setting: Setting, found: Fitted) -> Calibration:
    """What goes into the file.

    Args:
        name: The model's name or path.
        facts: Its sizes.
        setting: How it was served.
        found: What was measured.
    """
    import vllm
    from vllm.platforms import current_platform

    return Calibration(
        version=VERSION,
        model=name,
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        device=current_platform.get_device_name() or "CPU",
        tp=setting.tp,
        vllm=vllm.__version__,
        date=datetime.date.today().isoformat(),
        steps=found.steps.steps,
        held_up=found.steps.held_up,
        step_error=found.steps.error,
        rates=found.rates,
        dtype=facts.dtype if setting.dtype == "auto" else setting.dtype,
    )
