"""Answers of the composer that ships with the package, by vLLM and by plain PyTorch, as JSON.

Run by ``test_composer_shipped.py`` in a process of its own:
``python composer_shipped_engine.py CHECKPOINT``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from composer_engine import Case, answers, expected, request_of, start

from vllm_mm_ext.composer.configuration import SAMPLE_RATE
from vllm_mm_ext.composer.hf_processor import ComposerProcessor
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.samples import HELD_OUT, generated_sample
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.media.payload import Waveform

DTYPES = ("float32", "bfloat16")
SECONDS, FRAMES = 10, 20
QUESTIONS = 3


def cases_of(processor: ComposerProcessor) -> list[Case]:
    """Questions about a held-out clip with sound, with every reduction the checkpoint declares."""
    size = int(processor.config.vision_config.image_size)
    sample = generated_sample(HELD_OUT, SECONDS, FRAMES, QUESTIONS, size, augment=False)
    assert sample.sound is not None
    track = Waveform(sample.sound, digest="known", rate=SAMPLE_RATE)
    made = []
    for pool, temporal in processor.config.pairs:
        for question in sample.turns:
            parts = [{"type": "video"}, {"type": "text", "text": question.text}]
            prompt = processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
            )
            made.append(
                Case(
                    prompt,
                    (len(sample.frames),),
                    (sample.seconds,),
                    (track,),
                    reduction=Reduction(pool=pool, temporal=temporal),
                    shown=(sample.frames,),
                )
            )
    return made


def run(path: Path, dtype: str) -> dict[str, Any]:
    """What both say in one type."""
    processor = ComposerProcessor.from_pretrained(path)
    cases = cases_of(processor)
    model = ComposerForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
    plain = [expected(model, processor, case) for case in cases]
    engine = start(dtype, 4096, path)
    served = answers(engine, [request_of(case) for case in cases])
    del engine
    gc.collect()
    return {"plain": plain, "served": served, "eos": processor.tokenizer.eos_token_id}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "mm_ext"
    print(json.dumps({dtype: run(Path(sys.argv[1]), dtype) for dtype in DTYPES}))
