"""The names inside vLLM that the routes of live sessions rely on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_KEYS = "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware"

LIVE_ROUTE_NAMES: tuple[Checked, ...] = (
    VllmName(_KEYS, ("app", "tokens")),
    VllmName(f"{_KEYS}.verify_token", ("headers",)),
    VllmName("vllm.envs:VLLM_API_KEY"),
    VllmName("vllm.envs:VLLM_MAX_IMAGE_PIXELS"),
    VllmAttributes("vllm.config:VllmConfig", ("model_config",)),
    VllmAttributes("vllm.engine.protocol:EngineClient", ("vllm_config",)),
)
