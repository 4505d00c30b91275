"""Greedy answers of in-process engines, stock and in segments, as JSON on the last line of output.

Run by ``test_per_frame_engine.py`` in a process of its own:
``python per_frame_engine.py FAMILY DTYPE CHUNK MODE``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from omni_reference import pixels, video

from vllm_mm_ext.testing.checkpoints import checkpoint

CLIPS = (5, 12, 23)
SEGMENTS = (4, 7)
FRAME_TOKENS = 16
MAX_PATCHES = 200
TOKENS = 8
ARCHITECTURES = {
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}


def request(frames: int) -> dict[str, Any]:
    return {
        "prompt": "see <video> what",
        "multi_modal_data": {"video": [video(pixels(frames, 112, 112, frames))]},
    }


def start(family: str, dtype: str, chunk: int) -> Any:
    from vllm import LLM

    return LLM(
        str(checkpoint(family)),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
        limit_mm_per_prompt={"video": 1, "image": 0},
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


def main(family: str, dtype: str, chunk: int, mode: str) -> None:
    requests = [request(frames) for frames in CLIPS]
    if mode == "stock":
        print(json.dumps(answers(start(family, dtype, chunk), requests)))
        return
    from vllm_mm_ext import vllm_compat

    vllm_compat.override_models(
        {ARCHITECTURES[family]: f"vllm_mm_ext.models.{family}:{ARCHITECTURES[family]}"}
    )
    engine = start(family, dtype, chunk)
    engine.apply_model(watch_encoder)
    result: dict[str, Any] = {}
    for frames in SEGMENTS:
        engine.renderer.mm_processor.segment_tokens = frames * FRAME_TOKENS
        result[f"segments of {frames}"] = answers(engine, requests)

    def bound(model: Any) -> None:
        model.calls.clear()
        model.encoder_max_patches = MAX_PATCHES

    engine.apply_model(bound)
    result["bounded"] = answers(engine, requests)
    calls = engine.apply_model(lambda model: model.calls)[0]
    print(json.dumps({"answers": result, "calls": calls}))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = ""
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
