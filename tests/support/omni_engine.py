"""Answers of an in-process engine about videos with sound, as JSON on the last line of output.

Run by ``test_omni_engine.py`` in a process of its own: ``python omni_engine.py FAMILY CHUNK``.
"""

from __future__ import annotations

import json
import os
import sys

from omni_reference import pixels, sound, video

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

# Frames, frames per second, seconds of sound. Without frames: the waveform alone.
CLIPS = ((8, 2.0, 4.2), (2, 2.0, 0.9), (12, 1.0, 7.0), (0, 0.0, 0.9))
TOKENS = 6
PROMPTS = {
    "qwen2_5_omni": {
        "video": "see <|vision_bos|><|VIDEO|><|vision_eos|> what",
        "audio": "hear <|audio_bos|><|AUDIO|><|audio_eos|> what",
    },
    "qwen3_omni": {
        "video": "see <|vision_start|><|video_pad|><|vision_end|> what",
        "audio": "hear <|audio_start|><|audio_pad|><|audio_end|> what",
    },
}


def main(family: str, chunk: int) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(checkpoint(family)),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=4096,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
        limit_mm_per_prompt={"audio": 1, "video": 1, "image": 0},
        enable_prefix_caching=False,
    )
    requests = []
    for frames, fps, seconds in CLIPS:
        if frames:
            clip = video(pixels(frames), [i / fps for i in range(frames)], sound(seconds))
            data = {"prompt": PROMPTS[family]["video"], "multi_modal_data": {"video": [clip]}}
        else:
            data = {
                "prompt": PROMPTS[family]["audio"],
                "multi_modal_data": {"audio": [sound(seconds)]},
            }
        requests.append(data)
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1, ignore_eos=True)
    answers = []
    for answer in engine.generate(requests, greedy, use_tqdm=False):
        best = [next(iter(step.values())).logprob for step in answer.outputs[0].logprobs or ()]
        answers.append({"tokens": list(answer.outputs[0].token_ids), "logprobs": best})
    print(json.dumps(answers))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "mm_ext"
    main(sys.argv[1], int(sys.argv[2]))
