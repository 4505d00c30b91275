"""What commands do before they plan: the machine, its cores, and a plugin that logs nothing."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_mm_ext.planner.gpu_facts import GpuFacts

# Of a machine with GPUs, where the user says nothing.
_SERVER_CORES = 16


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usual_cores(gpu: GpuFacts) -> int:
    """CPU cores of a server where the user says nothing.

    Args:
        gpu: What the model runs on.
    """
    return (os.cpu_count() if gpu.is_cpu else None) or _SERVER_CORES


def register_quietly() -> None:
    """Register the plugin. What vLLM and transformers log meanwhile is no part of the answer."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from vllm_mm_ext.plugin import register

    register()
