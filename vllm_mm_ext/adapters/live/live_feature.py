"""Live sessions as a feature of the plugin."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.live_engine_names import LIVE_ENGINE_NAMES
from vllm_mm_ext.adapters.names.live_route_names import LIVE_ROUTE_NAMES
from vllm_mm_ext.adapters.vllm_compat import Feature


def _install() -> None:
    from vllm_mm_ext.adapters.serving.endpoints import MMExtEndpointPlugin

    MMExtEndpointPlugin.live_sessions = True


LIVE_FEATURE = Feature(
    "live sessions",
    "the server has no routes for live sessions",
    (*LIVE_ROUTE_NAMES, *LIVE_ENGINE_NAMES),
    _install,
)
