"""Arguments of ``vllm.LLM`` that name the plugin's engine parts, as ``configs/*.yaml`` do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEDULER = {"scheduler_cls": "vllm_mm_ext.scheduler.MMExtScheduler"}
DEVICE_TIER = {
    "ec_manager_config": {
        "encoder_cache_manager_cls": "vllm_mm_ext.encoder_cache.MMExtEncoderCacheManager"
    }
}
# Works beside the device tier only.
HOST_TIER = {
    "ec_transfer_config": {
        "ec_connector": "MMExtECConnector",
        "ec_role": "ec_both",
        "ec_connector_module_path": "vllm_mm_ext.encoder_cache",
    }
}
BOTH_TIERS = DEVICE_TIER | HOST_TIER
EVERY_PART = SCHEDULER | BOTH_TIERS


def sharing(role: str, directory: Path, gigabytes: float = 1.0) -> dict[str, Any]:
    """Both tiers, and behind them a directory in which instances share encoder outputs.

    Args:
        role: vLLM's ``ec_role``.
        directory: The directory.
        gigabytes: What it may hold.
    """
    transfer = {
        **HOST_TIER["ec_transfer_config"],
        "ec_role": role,
        "ec_connector_extra_config": {
            "transport": "ECExampleConnector",
            "shared_storage_path": str(directory),
            "shared_storage_gb": gigabytes,
        },
    }
    return {**DEVICE_TIER, "ec_transfer_config": transfer}


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """The same arguments as flags of ``vllm serve``."""
    flags = []
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value)
        flags += ["--" + name.replace("_", "-"), text]
    return flags
