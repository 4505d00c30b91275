"""Measurements inside an engine: a process per side that prints what it found as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.server import KV_CACHE_BYTES
from vllm_mm_ext.tools.bench.chat import conversation

# What lines for the benchmark begin with: engines print to stdout, too.
ANSWER = "measured: "
_TAIL = 3000
_CLOSE_S = 60.0


def measure(module: str, side: str, arguments: Sequence[str], *, timeout_s: float = 500.0) -> Any:
    """Run ``vllm_mm_ext.tools.bench.MODULE`` as a program and return its last line, read as JSON.

    Args:
        module: Its name; it is given ``side`` and ``arguments``.
        side: ``stock`` (no plugin is loaded) or ``plugin``.
        arguments: More arguments.
        timeout_s: Seconds it may take.

    Raises:
        RuntimeError: It failed; the message ends with its stderr.
    """
    done = subprocess.run(
        _command(module, side, arguments),
        env=_environment(side),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(f"{module} ({side}) failed:\n{done.stderr[-_TAIL:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Measurer:
    """``vllm_mm_ext.tools.bench.MODULE`` as a program that measures on request, until it is closed.

    So the sides can take turns within seconds: a machine whose speed changes is the same for both.
    The program ends its start with a line on stdout, and answers each line of JSON with one.

    Args:
        module: Its name; it is given ``side`` and ``arguments``.
        side: ``stock`` (no plugin is loaded) or ``plugin``.
        arguments: More arguments.
        environment: Variables that it gets besides.

    Raises:
        RuntimeError: It failed to start; the message ends with its stderr.
    """

    def __init__(
        self,
        module: str,
        side: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = f"{module} ({side})"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            _command(module, side, arguments),
            env={**_environment(side), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._answer()

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, question: Any) -> Any:
        """Have something measured; what is asked and found is the program's.

        Raises:
            RuntimeError: It failed; the message ends with its stderr.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let the program end, or end it."""
        try:
            with suppress(BrokenPipeError):
                self._process.communicate(timeout=_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._errors.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"{self._name} failed:\n{self._errors.read()[-_TAIL:]}")


def answer_questions(answer: Callable[[Any], Any]) -> None:
    """The other end of ``Measurer``: call once what is measured has been started."""
    print(f"{ANSWER}null", flush=True)
    for line in sys.stdin:
        print(f"{ANSWER}{json.dumps(answer(json.loads(line)))}", flush=True)


def _command(module: str, side: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", f"vllm_mm_ext.tools.bench.{module}", side, *arguments]


def _environment(side: str) -> dict[str, str]:
    return {
        **os.environ,
        "VLLM_PLUGINS": "mm_ext" if side == "plugin" else "",
        # The engine in this process, where its steps can be watched.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


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
