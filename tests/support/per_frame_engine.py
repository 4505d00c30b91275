"""Greedy answers of in-process engines, stock and in segments, as JSON on the last line of output.

Run by ``test_per_frame_engine.py`` in a process of its own:
``python per_frame_engine.py MODE FAMILY...``.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omni_reference import pixels, render, video

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

# Computation, and tokens of a step: the last cuts prefill inside segments.
CASES = (("float32", 4096), ("bfloat16", 4096), ("float32", 96))
# Stock takes no more frames of LLaVA-OneVision where a step is small.
CLIPS = (5, 12, 16)
SEGMENTS = (4, 7)
SIDE = 112
FRAME_TOKENS = 16
MAX_PATCHES = 200
TOKENS = 8
FAMILIES = ("llava_onevision", "internvl")

IMAGE_TOKENS = {"llava_onevision": "<image>", "internvl": "<IMG_CONTEXT>"}
REDUCTIONS = (
    Reduction(pool=4),
    Reduction(temporal=3),
    Reduction(static="prune", keep=0.4),
)


def requests_of(family: str) -> list[dict[str, Any]]:
    clips = [video(pixels(frames, SIDE, SIDE, frames)) for frames in CLIPS]
    # Not bytes: served whole, by the same model class.
    clips.append(pixels(6, SIDE, SIDE).astype(np.float32))
    image = pixels(1, SIDE, 2 * SIDE)[0]
    return [
        *({"prompt": "see <video> what", "multi_modal_data": {"video": [c]}} for c in clips),
        {"prompt": f"see {IMAGE_TOKENS[family]} what", "multi_modal_data": {"image": [image]}},
    ]


def start(family: str, dtype: str, chunk: int) -> Any:
    from vllm import LLM

    return LLM(
        str(checkpoint(family)),
        dtype=dtype,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=4096,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
        limit_mm_per_prompt={"video": 1, "image": 1},
    )


def answers(engine: Any, requests: Sequence[Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1, ignore_eos=True)
    found = []
    # One by one: the same batch sizes in every run, and stock's LLaVA-OneVision fails on two videos
    # of unequal length in one step.
    for one in requests:
        engine.reset_prefix_cache()
        engine.reset_mm_cache()
        engine.llm_engine.engine_core.reset_encoder_cache()
        answer = engine.generate([one], greedy, use_tqdm=False)[0]
        best = [next(iter(step.values())).logprob for step in answer.outputs[0].logprobs or ()]
        found.append(
            {
                "prompt": list(answer.prompt_token_ids),
                "tokens": list(answer.outputs[0].token_ids),
                "logprobs": best,
            }
        )
    return found


def watch_encoder(model: Any) -> None:
    """Keep the number of frames of each encoder call in ``model.calls``."""
    model.calls = []
    tower = model.vision_tower
    original = tower.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        model.calls.append(len(args[0] if args else kwargs["pixel_values"]))
        return original(*args, **kwargs)

    tower.forward = forward


def split_answers(engine: Any, requests: Sequence[Any]) -> dict[str, Any]:
    """Answers for each size of segments, and with bounded encoder calls, whose frames are told."""
    engine.apply_model(watch_encoder)
    found = {}
    for frames in SEGMENTS:
        engine.renderer.mm_processor.segment_tokens = frames * FRAME_TOKENS
        found[f"segments of {frames}"] = answers(engine, requests)

    def bound(model: Any) -> None:
        model.calls.clear()
        model.encoder_max_patches = MAX_PATCHES

    engine.apply_model(bound)
    found["bounded"] = answers(engine, requests)
    calls = engine.apply_model(lambda model: model.calls)[0]
    return {"answers": found, "calls": calls, "reduction_error": reduction_error(engine)}


def segments_of(engine: Any, reduction: Reduction) -> tuple[list[Any], list[int]]:
    """Inputs of a video's segments as vLLM batches them, and how many tokens each is to have."""
    from vllm.multimodal.utils import group_and_batch_mm_kwargs

    # A multiple of the frames that merge; segments are sized by what is left of them, and so cut
    # at the same places with and without a reduction.
    grid = math.isqrt(FRAME_TOKENS)
    engine.renderer.mm_processor.segment_tokens = reduction.count(6, grid, grid)
    frames = SampledFrames(pixels(9, SIDE, SIDE), digest=reduction.key(), reduction=reduction)
    made = render(engine.renderer.mm_processor, "<video>", {"video": [frames]})
    items = [("video", item) for item in made["mm_kwargs"]["video"]]
    batches = [batch for _, _, batch in group_and_batch_mm_kwargs(items)]
    return batches, [p.get_num_embeds() for p in made["mm_placeholders"]["video"]]


def reduction_error(engine: Any) -> float:
    """Largest difference of a reduced token to what it is to be made of."""
    whole, _ = segments_of(engine, NO_REDUCTION)
    embed = {r.key(): segments_of(engine, r) for r in REDUCTIONS}

    def worst(model: Any) -> float:
        plain = [tokens for batch in whole for tokens in model.embed_multimodal(**batch)]
        errors = []
        for reduction in REDUCTIONS:
            batches, counts = embed[reduction.key()]
            got = [tokens for batch in batches for tokens in model.embed_multimodal(**batch)]
            kept = [k for batch in batches for k in batch["video_kept"]]
            assert [len(tokens) for tokens in got] == counts
            for before, after, cells in zip(plain, got, kept, strict=True):
                errors.append(_difference(before, after, cells, reduction))
        return max(errors)

    with torch.inference_mode():
        return float(engine.apply_model(worst)[0])


def _difference(
    before: torch.Tensor, after: torch.Tensor, kept: torch.Tensor, reduction: Reduction
) -> float:
    count = len(before) // FRAME_TOKENS * FRAME_TOKENS
    frames, tail = before[:count].float().unflatten(0, (-1, FRAME_TOKENS)), before[count:]
    if reduction.pool > 1:  # One token is left of a frame.
        expected = frames.mean(dim=1)
    elif reduction.static == "prune":
        expected = frames.flatten(0, 1)[kept]
    else:  # An average of its group lies within it.
        groups = frames.split(reduction.temporal)
        low, high = (torch.stack([pick(group) for group in groups]) for pick in (_low, _high))
        expected = after[: len(after) - len(tail)].float().unflatten(0, low.shape[:2])
        expected = expected.clamp(low, high).flatten(0, 1)
    expected = torch.cat([expected, tail.float()])
    return float((after.float() - expected).abs().max())


def _low(group: torch.Tensor) -> torch.Tensor:
    return group.amin(dim=0)


def _high(group: torch.Tensor) -> torch.Tensor:
    return group.amax(dim=0)


def run(family: str, mode: str) -> list[Any]:
    """What a family answers in each case."""
    requests = requests_of(family)
    ask = split_answers if mode == "plugin" else answers
    found = []
    # What steps are cut into changes nothing of stock's answers.
    for case in CASES if mode == "plugin" else CASES[:2]:
        engine = start(family, *case)
        found.append(ask(engine, requests))
        del engine
        gc.collect()
    return found


def main(mode: str, families: Sequence[str]) -> None:
    print(json.dumps({family: run(family, mode) for family in families}))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "mm_ext" if sys.argv[1] == "plugin" else ""
    main(sys.argv[1], sys.argv[2:])
