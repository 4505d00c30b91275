"""Sets the rank that vLLM's API server routes a request by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.patches import wrap
from vllm_mm_ext.adapters.vllm_compat import Feature
from vllm_mm_ext.policies.affinity import rank_for

_CLIENT = "vllm.v1.engine.core_client:DPLBAsyncMPClient"


def route_by_content() -> None:
    """Send requests about the same media to the same data-parallel rank."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_core_engine_for_request(self: Any, request: Any) -> Any:
            # A rank that the client names stands; vLLM routes pooling requests by itself.
            named = request.data_parallel_rank is not None
            if request.mm_features and not named and request.pooling_params is None:
                # The first item: a longer version of a video begins with the same segment.
                content = request.mm_features[0].identifier
                request.data_parallel_rank = rank_for(content, _loads(self))
            return original(self, request)

        return get_core_engine_for_request

    wrap(DPLBAsyncMPClient, "get_core_engine_for_request", make)


def _loads(client: Any) -> list[float]:
    """Requests of each rank: as vLLM's coordinator told last, and no fewer than are from here.

    vLLM counts those from here once more for each other API server. That is right where loads are
    only compared; here it would take two requests about a video for an overload.
    """
    return [
        max(client.engine_inflight[engine], waiting + running)
        for engine, (waiting, running, *_) in zip(
            client.core_engines, client.lb_engines, strict=False
        )
    ]


ROUTING_FEATURE = Feature(
    "media affinity",
    "requests about the same media go to any data-parallel rank",
    (
        VllmName(f"{_CLIENT}.get_core_engine_for_request", ("request",)),
        VllmName(
            "vllm.v1.engine:EngineCoreRequest",
            ("mm_features", "data_parallel_rank", "pooling_params"),
            passed_on=True,
        ),
        VllmAttributes(_CLIENT, ("core_engines", "engine_inflight", "lb_engines")),
    ),
    route_by_content,
)
