"""What the planner knows of a machine: memory and rates, from ``data/gpus.yaml``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml  # type: ignore[import-untyped]

GIB = 1 << 30
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(g|gb|gib)", re.IGNORECASE)
CPU = "cpu"


class UnknownGpuError(ValueError):
    """No GPU of that name is known; the message names those that are."""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, or the memory of a machine without one.

    Attributes:
        name: As on the command line.
        title: Its full name.
        memory_bytes: Memory that CUDA reports.
        bf16_flops: Dense bfloat16 operations per second; None where only memory is known.
        bandwidth: Bytes of memory read per second; None where only memory is known.
        sources: Where the figures are from.
    """

    name: str
    title: str
    memory_bytes: int
    bf16_flops: float | None = None
    bandwidth: float | None = None
    sources: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Whether the model runs on a CPU."""
        return self.name == CPU


@dataclass(frozen=True)
class Site:
    """The machine that a plan is for.

    Attributes:
        gpu: Each GPU, or the CPU.
        tp, dp: GPUs of a replica, and replicas.
        host_memory: Bytes of memory of the machine; None if they are not known.
        cores: CPU cores.
        process_bytes: Memory of a Python process that has loaded vLLM and the model's code, which
            the API server and the processes of the engine are to begin with.
    """

    gpu: GpuFacts
    tp: int
    dp: int
    host_memory: int | None
    cores: int
    process_bytes: int


@cache
def known_gpus() -> dict[str, GpuFacts]:
    """The GPUs of the data file, by name."""
    text = resources.files(__package__).joinpath("data/gpus.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {
        name: GpuFacts(
            name,
            entry["title"],
            round(entry["memory_gib"] * GIB),
            entry["bf16_tflops"] * 1e12,
            entry["bandwidth_gb_s"] * 1e9,
            tuple(entry["sources"]),
        )
        for name, entry in entries.items()
    }


def gpu_of(name: str, host_memory: int) -> GpuFacts:
    """The GPU of a name, a GPU of which only the memory is given, or this machine's CPU.

    Args:
        name: Name in the data file, ``cpu``, or memory in GiB such as ``24gb``.
        host_memory: Bytes of this machine's memory, for ``cpu``.

    Raises:
        UnknownGpuError: It is none of those.
    """
    wanted = name.strip().lower()
    if wanted == CPU:
        return GpuFacts(CPU, "this machine's CPU", host_memory)
    if (found := known_gpus().get(wanted)) is not None:
        return found
    if memory := _MEMORY.fullmatch(wanted):
        size = round(float(memory[1]) * GIB)
        return GpuFacts(wanted, f"a GPU with {float(memory[1]):g} GiB", size)
    raise UnknownGpuError(
        f"--gpu {name}: one of {', '.join(known_gpus())}, a memory size such as 24gb, or cpu"
    )
