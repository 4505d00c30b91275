"""The eviction policy that vLLM's KV offloading is given by name; imports vLLM when first used."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "CostAwarePolicy":
        from vllm_mm_ext.adapters.kv.offload_policy import CostAwarePolicy

        return CostAwarePolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
