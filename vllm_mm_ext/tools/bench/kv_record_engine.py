"""Records KV accesses of an engine under the traffic of ``kv_traffic``.

    python -m vllm_mm_ext.tools.bench.kv_record_engine SIDE MODEL SEED FOLDER KIND...

Run by ``bench kv-replay --record``; writes a trace for each kind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_mm_ext.testing.engine_arguments import EVERY_PART
from vllm_mm_ext.tools.bench.commands import AccessKind
from vllm_mm_ext.tools.bench.inprocess import start
from vllm_mm_ext.tools.bench.kv_trace import record_accesses
from vllm_mm_ext.tools.bench.kv_traffic import CONCURRENT, TRAFFIC, Part, Prompt

HEIGHT, WIDTH = 112, 224
_SEGMENT_TOKENS = 128
_ANSWER = 8
_CONTEXT = 4096
_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def serve(llm: Any, prompts: Iterator[Prompt], concurrent: int) -> None:
    """Let an engine answer prompts, some at a time.

    Args:
        llm: A ``vllm.LLM`` whose engine runs in this process.
        prompts: The prompts.
        concurrent: Requests at a time.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    greedy = SamplingParams(max_tokens=_ANSWER, temperature=0, ignore_eos=True)
    number = 0
    left = True
    while left or engine.has_unfinished_requests():
        while left and engine.get_num_unfinished_requests() < concurrent:
            prompt = next(prompts, None)
            left = prompt is not None
            if prompt is not None:
                rendered = _rendered(prompt)
                engine.add_request(f"r{number}", rendered, greedy, session_id=prompt.session)
                number += 1
        if engine.has_unfinished_requests():
            engine.step()


def _rendered(prompt: Prompt) -> Any:
    text = "\n".join(_VIDEO if part.video else _words(part) for part in prompt.parts)
    videos = [_frames(part) for part in prompt.parts if part.video]
    return {"prompt": text} | ({"multi_modal_data": {"video": videos}} if videos else {})


def _words(part: Part) -> str:
    rng = np.random.default_rng(part.number)
    return " ".join(map(str, rng.integers(0, 10**3, part.size)))


def _frames(part: Part) -> Any:
    rng = np.random.default_rng(part.number)
    frames = rng.integers(0, 255, (part.size, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return frames, {
        "total_num_frames": part.size,
        "fps": 2.0,
        "duration": part.size / 2,
        "video_backend": "opencv",
        "frames_indices": list(range(part.size)),
        "do_sample_frames": False,
    }


def main(side: str, model: Path, seed: int, folder: Path, kinds: list[AccessKind]) -> None:
    """Record each kind."""
    config = {"mm_ext": {"segments": {"tokens": _SEGMENT_TOKENS}}}
    options = {"additional_config": config, **EVERY_PART} if side == "plugin" else {}
    llm = start(
        model,
        folder,
        dtype="float32",
        max_model_len=_CONTEXT,
        limit_mm_per_prompt={"video": 8, "image": 0},
        mm_processor_cache_gb=0,
        **options,
    )
    for kind in kinds:
        llm.reset_prefix_cache()
        with record_accesses(llm) as recorder:
            serve(llm, TRAFFIC[kind](seed), CONCURRENT.get(kind, 1))
        what = " ".join((TRAFFIC[kind].__doc__ or "").splitlines()[0].rstrip(".").lower().split())
        recorder.trace().write(folder / f"{kind}.txt", f"{kind}, seed {seed}: {what}")
    print("null")


if __name__ == "__main__":
    _, _side, _model, _seed, _folder, *_kinds = sys.argv
    main(_side, Path(_model), int(_seed), Path(_folder), [AccessKind(kind) for kind in _kinds])
