"""Greedy answers of 200 mixed requests in a small KV cache, as JSON on the last line.

Run by ``test_scheduler_engine.py`` in a process of its own:
``python scheduler_engine.py stock|plugin``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import numpy as np

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import EVERY_PART
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

REQUESTS = 200
VIDEOS = 12
SESSIONS = 5
PROMPT = "see <|vision_start|><|video_pad|><|vision_end|> what"
CONFIG = {
    "mm_ext": {
        "media": {"sampling": {"policy": "stock"}, "resize": "native"},
        "segments": {"tokens": 48},
        "scheduler": {"target_itl_ms": 20.0},
        # A video or two on the device, all of them in host memory.
        "encoder_cache": {"device_mb": 0.1, "host_mb": 4.0},
    }
}


def start(mode: str) -> Any:
    from vllm import LLM

    extra: dict[str, Any] = {}
    if mode != "stock":
        extra = {**EVERY_PART, "additional_config": CONFIG}
    return LLM(
        str(checkpoint("qwen2_5_vl")),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=8,
        block_size=32,
        # Three of the largest requests at once, so that answers outgrow it.
        num_gpu_blocks_override=48,
        limit_mm_per_prompt={"video": 1, "image": 0},
        **extra,
    )


def requests() -> tuple[list[Any], list[Any]]:
    """Prompts and sampling: text of all lengths, videos (some twice), n = 2, a JSON schema."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    rng = np.random.default_rng(3)
    clips = [
        rng.integers(0, 255, (2 * int(rng.integers(2, 9)), 112, 168, 3), dtype=np.uint8)
        for _ in range(VIDEOS)
    ]
    prompts: list[Any] = []
    sampling = []
    for number in range(REQUESTS):
        shape: dict[str, Any] = {}
        if number % 3 == 0:
            clip = clips[int(rng.integers(VIDEOS))]
            metadata = {
                "total_num_frames": len(clip),
                "fps": 2.0,
                "duration": len(clip) / 2,
                "video_backend": "opencv",
                "frames_indices": list(range(len(clip))),
                "do_sample_frames": False,
            }
            media = {"video": [(clip, metadata)]}
            prompts.append({"prompt": f"{PROMPT} {number % 7}", "multi_modal_data": media})
        else:
            length = int(rng.integers(4, 400))
            prompts.append({"prompt_token_ids": rng.integers(5, 250, length).tolist()})
        if number % 10 == 7:
            shape["structured_outputs"] = StructuredOutputsParams(choice=["yes", "no", "perhaps"])
        elif number % 25 == 4:
            # vLLM refuses n > 1 at temperature 0.
            shape |= {"n": 2, "temperature": 1.0, "top_k": 1}
        sampling.append(
            SamplingParams(
                **{
                    "temperature": 0,
                    "max_tokens": int(rng.integers(1, 120)),
                    "ignore_eos": "structured_outputs" not in shape,
                    **shape,
                }
            )
        )
    return prompts, sampling


def name_sessions(engine: Any) -> None:
    """Let two of three requests have a ``session_id``, which ``vllm.LLM`` has no argument for."""
    add_request = engine.add_request

    def with_session(request_id: str, *args: Any, **kwargs: Any) -> Any:
        number = int(request_id)
        session = f"session {number % SESSIONS}" if number % 3 != 1 else None
        return add_request(request_id, *args, session_id=session, **kwargs)

    engine.add_request = with_session


def caches(scheduler: Any) -> dict[str, Any]:
    """What the plugin's caches are, and whether their bookkeeping is as it should be."""
    manager, host = scheduler.encoder_cache_manager, scheduler.ec_connector
    pool = scheduler.kv_cache_manager.block_pool
    for one in (manager, host._tier, pool):
        one.check_integrity()
    return {
        "caches": [type(one).__name__ for one in (manager, host, pool)],
        "sessions": len(pool.sessions),
    }


def cut_short(llm: Any, video: dict[str, Any], *, preempted: bool) -> list[int]:
    """The answer about a video whose KV is found, and gone again when the answer is half done.

    Args:
        llm: The engine.
        video: The prompt.
        preempted: False leaves the KV where it is. vLLM's own scheduler needs that: with it the
            engine ends, as the runner is asked to encode what it was not sent.
    """
    from vllm import SamplingParams

    prompt = {**video, "prompt": video["prompt"] + " and why" * 20}
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm.generate([prompt], sampling, use_tqdm=False)
    engine = llm.llm_engine
    llm.enqueue([prompt], sampling, use_tqdm=False)
    for _ in range(10):
        engine.step()
    if preempted:
        assert llm.reset_prefix_cache(reset_running_requests=True)
        engine.reset_encoder_cache()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answer = output
    assert answer.num_cached_tokens > 32
    return list(answer.outputs[0].token_ids)


def main(mode: str) -> None:
    llm = start(mode)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    name_sessions(llm.llm_engine)
    seen = {"preempted": 0, "items": 0, "evicted": 0}
    schedule = scheduler.schedule

    def counted(*args: Any) -> Any:
        output = schedule(*args)
        seen["preempted"] += len(output.preempted_req_ids or ())
        seen["items"] += sum(len(one) for one in output.scheduled_encoder_inputs.values())
        seen["evicted"] += len(output.free_encoder_mm_hashes)
        return output

    scheduler.schedule = counted
    prompts, sampling = requests()
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    found = {
        "scheduler": type(scheduler).__name__,
        "tokens": [[list(one.token_ids) for one in answer.outputs] for answer in answers],
        **seen,
        **(caches(scheduler) if mode == "plugin" else {}),
        "cut_short": cut_short(llm, prompts[0], preempted=mode == "plugin"),
        "items_again": seen["items"],
        "left": len(scheduler.requests),
    }
    del llm, scheduler
    gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "" if sys.argv[1] == "stock" else "mm_ext"
    main(sys.argv[1])
