"""Arguments of ``vllm.LLM`` that name the plugin's engine parts, as ``configs/*.yaml`` do."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """The same arguments as flags of ``vllm serve``."""
    flags = []
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value)
        flags += ["--" + name.replace("_", "-"), text]
    return flags
