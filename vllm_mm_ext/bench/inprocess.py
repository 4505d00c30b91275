"""Measurements inside an engine: a process per side that prints what it found as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mm_ext.bench.chat import conversation
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

_TAIL = 3000


def measure(module: str, side: str, arguments: Sequence[str], *, timeout_s: float = 500.0) -> Any:
    """Run ``vllm_mm_ext.bench.MODULE`` as a program and return its last line, read as JSON.

    Args:
        module: Its name; it is given ``side`` and ``arguments``.
        side: ``stock`` (no plugin is loaded) or ``plugin``.
        arguments: More arguments.
        timeout_s: Seconds it may take.

    Raises:
        RuntimeError: It failed; the message ends with its stderr.
    """
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "mm_ext" if side == "plugin" else "",
        # The engine in this process, where its steps can be watched.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", f"vllm_mm_ext.bench.{module}", side, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode:
        raise RuntimeError(f"{module} ({side}) failed:\n{done.stderr[-_TAIL:]}")
    return json.loads(done.stdout.splitlines()[-1])


def start(model: Path, media: Path, **options: Any) -> Any:
    """A ``vllm.LLM`` in this process that reads videos of one directory.

    Args:
        model: Checkpoint.
        media: Directory of videos.
        options: More arguments of ``vllm.LLM``.
    """
    from vllm import LLM

    # Small blocks; the CPU's default of 128 would round cache hits coarsely.
    defaults = {
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    return LLM(str(model), allowed_local_media_path=str(media), **(defaults | options))


def ask(llm: Any, file: Path, turn: int = 1, *, max_tokens: int = 2) -> int:
    """Ask turn ``turn`` of a conversation about a video; returns the length of the prompt."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    messages: Any = conversation(file.as_uri(), turn)
    (answer,) = llm.chat(messages, greedy, use_tqdm=False)
    return len(answer.prompt_token_ids)
