"""Greedy answers with stock's encoder cache and with both tiers of the plugin's, as JSON.

Run by ``test_encoder_cache_engine.py``: ``python encoder_cache_engine.py MEDIA_DIRECTORY``. The
plugin is loaded after the stock engine has answered, in the same process.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import BOTH_TIERS
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.server import KV_CACHE_BYTES
from vllm_mm_ext.testing.step_trace import record_steps

CLIPS = 5
ROUNDS = 3
TOKENS = 6
# MiB that hold about two of the clips, and all of them.
DEVICE_MB, HOST_MB = 0.1, 4.0
PLUGIN: dict[str, Any] = {
    **BOTH_TIERS,
    # Stock's own frames at native size, so that only segments and caches differ.
    "additional_config": {
        "mm_ext": {
            "media": {"sampling": {"policy": "stock"}, "resize": "native"},
            "segments": {"tokens": 64},
            "encoder_cache": {"device_mb": DEVICE_MB, "host_mb": HOST_MB},
        }
    },
}


def make_media(directory: Path) -> list[Path]:
    """Clips of different lengths."""
    return [
        make_clip(
            directory / f"clip-{number}.mp4",
            duration=6.0 + number,
            seed=number,
            fps=10,
            width=168,
            height=112,
        ).path
        for number in range(CLIPS)
    ]


def start(media: Path, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(checkpoint("qwen2_5_vl")),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=512,
        max_num_batched_tokens=128,
        max_num_seqs=3,
        block_size=32,
        # For two of the prompts: requests wait for each other, or are preempted.
        num_gpu_blocks_override=18,
        limit_mm_per_prompt={"video": 1, "image": 0},
        allowed_local_media_path=str(media),
        **options,
    )


def conversation(file: Path) -> list[Any]:
    content = [
        {"type": "video_url", "video_url": {"url": file.as_uri()}},
        {"type": "text", "text": "What happens?"},
    ]
    return [{"role": "user", "content": content}]


def ask(engine: Any, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Answers about some videos, asked all at once."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1, ignore_eos=True)
    answers = engine.chat([conversation(file) for file in files], greedy, use_tqdm=False)
    return [
        {
            "prompt": list(answer.prompt_token_ids),
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": [
                next(iter(step.values())).logprob for step in answer.outputs[0].logprobs or ()
            ],
        }
        for answer in answers
    ]


def rounds(engine: Any, files: Sequence[Path]) -> tuple[list[Any], list[int]]:
    """Answers about all videos, round after round without KV, and the items each encoded."""
    found, encoded = [], []
    for _ in range(ROUNDS):
        engine.reset_prefix_cache()
        with record_steps(engine) as trace:
            found.append(ask(engine, files))
        encoded.append(len(trace.encoded()))
    return found, encoded


def device_memory(engine: Any, files: Sequence[Path]) -> int:
    """Bytes that the encoder cache of the runner holds at most, one or all videos asked about."""
    core = engine.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    held = []
    core.reset_encoder_cache()
    for file in files:
        for asked in ([file], files):
            engine.reset_prefix_cache()
            ask(engine, asked)
            storages = (output.untyped_storage() for output in runner.encoder_cache.values())
            held.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
    return max(held)


def refuses_embeddings(engine: Any) -> str:
    """What a client is told who sends embeddings."""
    from vllm.exceptions import VLLMValidationError

    content = [{"type": "image_embeds", "image_embeds": None, "uuid": "x"}]
    try:
        engine.chat([{"role": "user", "content": content}], use_tqdm=False)
    except VLLMValidationError as error:  # A 400.
        return str(error)
    return ""


def main(media: Path) -> None:
    files = make_media(media)
    engine = start(media)
    stock, stock_encoded = rounds(engine, files)
    del engine
    gc.collect()

    from vllm.model_executor.model_loader import utils

    from vllm_mm_ext import plugin

    # The class of the model, which the plugin replaces, is remembered.
    utils._MODEL_ARCH_BY_HASH.clear()
    statuses = plugin.register()
    engine = start(media, **PLUGIN)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    manager, host = scheduler.encoder_cache_manager, scheduler.ec_connector
    ours, encoded = rounds(engine, files)
    manager.check_integrity()
    host._tier.check_integrity()
    found = {
        "off": [status.name for status in statuses if not status.active],
        "classes": [type(manager).__name__, type(host).__name__],
        "stock": stock,
        "plugin": ours,
        "stock_encoded": stock_encoded,
        "encoded": encoded,
        "refusal": refuses_embeddings(engine),
        "device": [manager._cache.held, manager._cache.capacity, host._tier.held],
    }
    engine.reset_mm_cache()
    engine.reset_prefix_cache()
    with record_steps(engine) as trace:
        found["after reset_mm_cache"] = [ask(engine, files), len(trace.encoded())]
    engine.reset_prefix_cache()
    engine.llm_engine.engine_core.reset_encoder_cache()
    with record_steps(engine) as trace:
        found["after reset_encoder_cache"] = [ask(engine, files), len(trace.encoded())]
    found["device_memory"] = device_memory(engine, files)
    manager.check_integrity()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
