"""Greedy answers about videos, from stock engines or from segments, as JSON on the last line.

Run by ``test_segments_engine.py`` in a process of its own:
``python segments_engine.py stock|plugin MEDIA_DIRECTORY FAMILY...``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_reference import pixels, video

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_clip
from vllm_mm_ext.testing.server import KV_CACHE_BYTES
from vllm_mm_ext.testing.step_trace import record_steps

TOKENS = 8
WHOLE_PROMPT = 4096
# Tokens of a step; the last cuts prefill anywhere and encodes bit by bit.
STOCK_STEPS = (WHOLE_PROMPT,)
PLUGIN_STEPS = (*STOCK_STEPS, 160)
SILENT = ("shapes.mp4", "pan.mp4", "cuts.mp4")
SOUNDING = ("sound_a.mp4", "sound_b.mp4", "sound_c.mp4")
REDUCED_FRAMES = 12
REDUCTIONS = (
    NO_REDUCTION,
    Reduction(pool=2),
    Reduction(temporal=2),
    Reduction(static="merge", keep=0.5),
    Reduction(static="prune", keep=0.3),
    Reduction(pool=2, temporal=3, static="merge", keep=0.6),
)
_QWEN = "see <|vision_start|><|video_pad|><|vision_end|> what"
PLACEHOLDERS = {
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_omni": _QWEN,
    "qwen2_5_omni": "see <|vision_bos|><|VIDEO|><|vision_eos|> what",
}
# Stock's own frames at native size, so that nothing but the segments differs.
CONFIG = {"mm_ext": {"media": {"sampling": {"policy": "stock"}, "resize": "native"}}}


def make_media(directory: Path) -> None:
    """Three silent clips and three with sound, of different lengths and frame rates."""
    size = {"width": 168, "height": 112}
    make_clip(directory / "shapes.mp4", duration=6.5, seed=1, fps=12, **size)
    make_clip(directory / "pan.mp4", duration=9.0, scene="pan", seed=2, fps=15, **size)
    make_clip(directory / "cuts.mp4", duration=12.3, scene="cuts", seed=3, fps=10, **size)
    for number, (name, seconds) in enumerate(zip(SOUNDING, (11.0, 12.4, 14.9), strict=True)):
        tones = [Tone(300.0 + 200 * number, 0.0, 6.0), Tone(1500.0, 4.0, seconds)]
        make_clip(directory / name, duration=seconds, seed=number, fps=10, audio=tones, **size)


def start(family: str, chunk: int, media: Path, plugin: bool) -> Any:
    from vllm import LLM

    omni = family.endswith("omni")
    return LLM(
        str(checkpoint(family)),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=4096,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
        limit_mm_per_prompt={"video": 1, "image": 0} | ({"audio": 1} if omni else {}),
        allowed_local_media_path=str(media),
        additional_config=CONFIG if plugin else {},
    )


def answers(engine: Any, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Prompt, tokens, logprobs and number of encoded items for each file, asked one by one."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1, ignore_eos=True)
    found = []
    for file in files:
        engine.reset_prefix_cache()
        engine.reset_mm_cache()
        engine.llm_engine.engine_core.reset_encoder_cache()
        content = [
            {"type": "video_url", "video_url": {"url": file.as_uri()}},
            {"type": "text", "text": "What happens?"},
        ]
        with record_steps(engine) as trace:
            (answer,) = engine.chat([{"role": "user", "content": content}], greedy, use_tqdm=False)
        videos = [item for item in trace.encoded() if item.modality == "video"]
        found.append(
            {
                "prompt": list(answer.prompt_token_ids),
                "tokens": list(answer.outputs[0].token_ids),
                "logprobs": [
                    next(iter(step.values())).logprob for step in answer.outputs[0].logprobs or ()
                ],
                "items": len(videos),
                "first": videos[0].embeddings,
            }
        )
    return found


def split_answers(engine: Any, files: Sequence[Path]) -> dict[str, Any]:
    """Answers for whole videos, two sizes of segments, and (once) without merging positions."""
    processor = engine.renderer.mm_processor
    processor.segment_tokens = 0
    found = {"whole": answers(engine, files)}
    # One token: every temporal grid (two seconds with sound) is a segment.
    processor.segment_tokens = 1
    found["smallest"] = answers(engine, files)
    processor.segment_tokens = 5 * max(answer["first"] for answer in found["smallest"]) // 2
    found["larger"] = answers(engine, files)
    merges = engine.apply_model(lambda model: hasattr(model, "merges_segments"))[0]
    if merges:
        engine.apply_model(lambda model: setattr(model, "merges_segments", False))
        found["not merged"] = answers(engine, files)
        engine.apply_model(lambda model: setattr(model, "merges_segments", True))
    return found


def reduced_counts(engine: Any, family: str) -> list[dict[str, Any]]:
    """Answers about a video with its tokens reduced, and how many tokens were foretold."""
    from vllm import SamplingParams

    processor = engine.renderer.mm_processor
    processor.segment_tokens = 300
    times = [i / 2 for i in range(REDUCED_FRAMES)]
    found = []
    for reduction in REDUCTIONS:
        frames = pixels(REDUCED_FRAMES, 112, 168)
        clip = video(frames, times, digest=reduction.key(), reduction=reduction)
        sampled, metadata = clip.media
        size = processor.layout(processor.shape_of(sampled, metadata), {}).size
        count = processor.video_tokens(
            REDUCED_FRAMES, *size, times=times, audio_samples=0, reduction=reduction
        )
        request = {"prompt": PLACEHOLDERS[family], "multi_modal_data": {"video": [clip]}}
        greedy = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        (answer,) = engine.generate([request], greedy, use_tqdm=False)
        plain = len(engine.get_tokenizer().encode(PLACEHOLDERS[family], add_special_tokens=False))
        found.append(
            {
                "foretold": plain - 1 + count.total,
                "prompt": len(answer.prompt_token_ids),
                "tokens": list(answer.outputs[0].token_ids),
            }
        )
    return found


def chunked_answers(engine: Any, files: Sequence[Path]) -> dict[str, Any]:
    """Answers for the smallest segments alone: what is larger than a step is not served whole."""
    engine.renderer.mm_processor.segment_tokens = 1
    return {"smallest": answers(engine, files)}


def run(family: str, media: Path, plugin: bool) -> dict[str, Any]:
    """Answers by tokens of a step, then by what was asked."""
    found: dict[str, Any] = {}
    for chunk in PLUGIN_STEPS if plugin else STOCK_STEPS:
        engine = start(family, chunk, media, plugin)
        ask = split_answers if chunk >= WHOLE_PROMPT else chunked_answers
        case = found[f"steps of {chunk}"] = {}
        silent = [media / name for name in SILENT]
        case["silent"] = ask(engine, silent) if plugin else answers(engine, silent)
        if plugin and family.endswith("omni"):
            case["sounding"] = ask(engine, [media / name for name in SOUNDING])
        if plugin and chunk == WHOLE_PROMPT:
            case["reduced"] = reduced_counts(engine, family)
        del engine
        gc.collect()
    return found


def main(mode: str, media: Path, families: Sequence[str]) -> None:
    print(json.dumps({family: run(family, media, mode == "plugin") for family in families}))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "mm_ext" if sys.argv[1] == "plugin" else ""
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
