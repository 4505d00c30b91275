"""Encoder outputs kept between requests: on the device, and in host memory.

vLLM's command line names classes of this package. They import vLLM when they are first used.
"""

from __future__ import annotations

from typing import Any

_ADAPTERS = {"MMExtEncoderCacheManager": "manager", "MMExtECConnector": "ec_connector"}


def __getattr__(name: str) -> Any:
    if name not in _ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(
        importlib.import_module(f"vllm_mm_ext.adapters.encoder_cache.{_ADAPTERS[name]}"), name
    )
