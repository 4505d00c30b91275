"""Greedy answers with LoRA adapters and speculative decoding, as JSON on the last line.

Run by ``test_scheduler_engine.py`` in a process of its own:
``python scheduler_combinations_engine.py stock|plugin``. The same requests come twice, with other
adapters; in between the prefix cache is emptied.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scheduler_engine import CONFIG, requests

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import EVERY_PART
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

REQUESTS = 18
RANK = 8
# Width of the tiny model, and layers.
WIDTH = 128
LAYERS = 2
# So strong that answers differ.
SCALE = 0.5


def adapter(folder: Path, seed: int) -> Path:
    """A random LoRA adapter as PEFT writes one."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "o_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for module in config["target_modules"]:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK))):
                weights[f"{name}.lora_{part}.weight"] = SCALE * torch.randn(shape, generator=random)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


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
        num_gpu_blocks_override=34,
        limit_mm_per_prompt={"video": 1, "image": 0},
        enable_lora=True,
        max_loras=1,
        max_lora_rank=RANK,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        **extra,
    )


def main(mode: str) -> None:
    from vllm.lora.request import LoRARequest

    llm = start(mode)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    seen = {"drafts": 0, "items": 0, "preempted": 0}
    schedule = scheduler.schedule

    def counted(*args: Any) -> Any:
        output = schedule(*args)
        seen["preempted"] += len(output.preempted_req_ids or ())
        seen["drafts"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        seen["items"] += sum(map(len, output.scheduled_encoder_inputs.values()))
        return output

    scheduler.schedule = counted
    prompts, sampling = (found[:REQUESTS] for found in requests())
    for one in sampling:
        # vLLM's rejection sampler fails on top_k in a step without drafts.
        one.n, one.temperature, one.top_k = 1, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        adapters = [
            LoRARequest(f"adapter{seed}", seed, str(adapter(Path(folder) / str(seed), seed)))
            for seed in (1, 2)
        ]
        tokens, reset = [], []
        for shift in (0, 1):
            # All have an adapter: vLLM's CPU kernels give a request without one the last adapter
            # (index -1) where it is computed together with others.
            loras = [adapters[(number // 3 + shift) % 2] for number in range(REQUESTS)]
            answers = llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
            tokens.append([[list(one.token_ids) for one in answer.outputs] for answer in answers])
            reset.append(llm.reset_prefix_cache())
    found = {
        "scheduler": type(scheduler).__name__,
        "tokens": tokens,
        "reset": reset,
        "free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "left": len(scheduler.requests),
        **seen,
    }
    del llm, scheduler
    gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "" if sys.argv[1] == "stock" else "mm_ext"
    main(sys.argv[1])
