"""How ``serve`` runs a model that the user names: at the size it needs, not at that of tests."""

from __future__ import annotations

from typing import Any

from vllm_mm_ext.testing.server import may_download

_START_S = 1800.0


def on_cpu() -> bool:
    """Whether vLLM would run a model on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def as_named() -> dict[str, Any]:
    """Arguments of ``serve`` for a model that the user names.

    On a GPU vLLM sizes the KV cache and compiles the model, as it does of itself. On a CPU vLLM
    would ask for 92 % of the memory to be free, and need a compiler: there the KV cache has
    ``VLLM_CPU_KVCACHE_SPACE`` GiB, or without that variable as many bytes as in tests, and the
    model is not compiled.
    """
    sizes: dict[str, Any] = {"kv_cache_bytes": None, "enforce_eager": False}
    return {"env": may_download(), "timeout_s": _START_S, **({} if on_cpu() else sizes)}
