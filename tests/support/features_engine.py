"""Greedy answers with every feature on, with one of them off at a time, and without the plugin.

Run by ``test_features_engine.py`` in a process of its own, JSON on the last line of output:
``python features_engine.py stock|plugin MEDIA_DIRECTORY``. Each engine also tells what was really
at work in it: an answer alone is the same with and without the plugin.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.encoder_calls import record_encoder_calls
from vllm_mm_ext.testing.engine_arguments import BOTH_TIERS, HOST_TIER, SCHEDULER
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

FILES = ("shapes.mp4", "pan.mp4")
TOKENS = 8
# One temporal grid of 96 patches a call; a segment holds two of them.
MAX_PATCHES = 128
# Stock's own frames at native size, so that answers can be compared; what changes pixels apart.
EVERYTHING: dict[str, Any] = {
    **SCHEDULER,
    **BOTH_TIERS,
    "additional_config": {
        "mm_ext": {
            "media": {"sampling": {"policy": "stock"}, "resize": "native"},
            "segments": {"tokens": 64},
            "compression": {"encoder_max_patches": MAX_PATCHES},
        }
    },
}


def variants() -> dict[str, dict[str, Any]]:
    """Arguments of the engine by what is off, where the plugin is loaded."""
    found = {
        "nothing": EVERYTHING,
        "scheduler": without(SCHEDULER),
        "host tier": without(HOST_TIER),
        "encoder cache": without(BOTH_TIERS),
    }
    for name, section, settings in (
        ("front-end", "media", {"enabled": False}),
        ("KV blocks", "kv", {"enabled": False}),
        ("segments", "segments", {"tokens": 0}),
        ("encoder batches", "compression", {"encoder_max_patches": 0}),
        ("quality", "quality", {"enabled": False}),
    ):
        options = deepcopy(EVERYTHING)
        options["additional_config"]["mm_ext"].setdefault(section, {}).update(settings)
        found[name] = options
    return found


def unloaded_variants() -> dict[str, dict[str, Any]]:
    """The same where vLLM does not load the plugin: without it, and with its classes named."""
    return {"plugin": {}, "entry points": without(HOST_TIER)}


def without(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but some arguments."""
    return {key: value for key, value in EVERYTHING.items() if key not in keys}


def make_media(directory: Path) -> None:
    """Two clips."""
    make_clip(directory / FILES[0], duration=6.5, seed=1, fps=12, width=168, height=112)
    make_clip(directory / FILES[1], duration=9, scene="pan", seed=2, fps=15, width=168, height=112)


def start(media: Path, options: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        str(checkpoint("qwen2_5_vl")),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=2048,
        max_num_batched_tokens=512,
        max_num_seqs=4,
        block_size=32,
        limit_mm_per_prompt={"video": 1, "image": 0},
        allowed_local_media_path=str(media),
        **options,
    )


def answers(engine: Any, media: Path) -> list[list[int]]:
    """Tokens for two videos and a text at once, then for a second turn about each video."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    first = [
        *([turn(media / name, "What happens?")] for name in FILES),
        [{"role": "user", "content": "Say something."}],
    ]
    found = engine.chat(first, greedy, use_tqdm=False)
    second = [
        [
            *messages,
            {"role": "assistant", "content": "Something."},
            {"role": "user", "content": "And then?"},
        ]
        for messages in first[: len(FILES)]
    ]
    found += engine.chat(second, greedy, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in found]


def turn(file: Path, text: str) -> dict[str, Any]:
    """A message about a video."""
    content = [
        {"type": "video_url", "video_url": {"url": file.as_uri()}},
        {"type": "text", "text": text},
    ]
    return {"role": "user", "content": content}


# --- what was at work -----------------------------------------------------------------------------


def outcome(media: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Answers of an engine, its parts, and the work it did.

    Its keys: ``tokens`` of each answer; ``parts`` as ``parts`` has them; ``items``, mm items that
    each request became; ``calls``, patches of each encoder call; ``stock_loads``, videos that
    vLLM's own loader read; ``tier`` as ``tier_when_busy`` has it.
    """
    engine = start(media, options)
    with (
        record_items(engine) as items,
        record_encoder_calls(engine) as calls,
        record_stock_loads() as loads,
    ):
        tokens = answers(engine, media)
    found = {
        "tokens": tokens,
        "parts": parts(engine),
        "items": items,
        "calls": calls,
        "stock_loads": len(loads),
        "tier": tier_when_busy(engine),
    }
    engine.llm_engine.engine_core.shutdown()
    return found


def parts(engine: Any) -> dict[str, str]:
    """Package and class of what the plugin may replace."""
    scheduler = scheduler_of(engine)
    (model,) = engine.apply_model(whose)
    return {
        "scheduler": whose(scheduler),
        "KV blocks": whose(scheduler.kv_cache_manager.block_pool),
        "encoder cache": whose(scheduler.encoder_cache_manager),
        "host tier": whose(scheduler.ec_connector),
        "model": model,
        "processor": whose(engine.renderer.mm_processor),
    }


def whose(part: object) -> str:
    """``package.Class``; the model keeps its class name, so the package has to tell."""
    return f"{type(part).__module__.partition('.')[0]}.{type(part).__name__}"


def scheduler_of(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def record_items(engine: Any) -> Iterator[list[int]]:
    """Number of mm items of each request that reaches the scheduler, in their order."""
    found: list[int] = []
    scheduler = scheduler_of(engine)
    add_request = scheduler.add_request

    def noted(request: Any) -> None:
        found.append(len(request.mm_features))
        add_request(request)

    scheduler.add_request = noted
    try:
        yield found
    finally:
        # Uncovers the class's own method.
        del scheduler.add_request


@contextmanager
def record_stock_loads() -> Iterator[list[int]]:
    """Bytes of each video that vLLM itself decodes."""
    from vllm.multimodal.media.video import VideoMediaIO

    found: list[int] = []
    load_bytes = VideoMediaIO.load_bytes

    def noted(self: Any, data: bytes) -> Any:
        found.append(len(data))
        return load_bytes(self, data)

    VideoMediaIO.load_bytes = noted
    try:
        yield found
    finally:
        VideoMediaIO.load_bytes = load_bytes


def tier_when_busy(engine: Any) -> int | None:
    """The load tier videos would get if the engine were full; None where none is ever asked for.

    Tiers change pixels, so answers that are compared were made without load.
    """
    from vllm.renderers.base import BaseRenderer

    from vllm_mm_ext.adapters.quality.service import controller_for, state_for
    from vllm_mm_ext.base.shared_state import EngineLoad

    # Left by the plugin's wrapper, from which videos are planned.
    if not hasattr(BaseRenderer.render_chat, "_mm_ext"):
        return None
    config = engine.llm_engine.vllm_config
    busy = EngineLoad(time=time.monotonic(), kv_usage=1.0, running=4, waiting=100, slots=4)
    state_for(config).write_load(0, busy)
    return controller_for(config).level()


def refusal(media: Path) -> str:
    """Why an engine with these arguments does not start."""
    try:
        start(media, EVERYTHING)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(mode: str, media: Path) -> None:
    found: dict[str, Any] = {}
    for name, options in (variants() if mode == "plugin" else unloaded_variants()).items():
        found[name] = outcome(media, options)
        gc.collect()
    refused = refusal(media) if mode == "stock" else ""
    print(json.dumps({"outcomes": found, "refusal": refused}))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "mm_ext" if sys.argv[1] == "plugin" else ""
    main(sys.argv[1], Path(sys.argv[2]))
