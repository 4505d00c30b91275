"""Sets the rank that vLLM's API server routes a request by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.patches import wrap
from vllm_mm_ext.adapters.vllm_compat import Feature
from vllm_mm_ext.policies.affinity import rank_for

_CLIENT = "vllm.v1.engine.core_client:DPLBAsyncMPClient"


class _Added:
    """What one of vLLM's clients has added to the loads that the coordinator told last.

    vLLM adds ``client_count`` for each request that it routes by itself.
    """

    def __init__(self) -> None:
        self._told: Any = None
        self._by_rank: Counter[int] = Counter()

    def to(self, told: Any) -> Counter[int]:
        """By rank, to these loads; vLLM has a new list for each message of the coordinator."""
        if told is not self._told:
            self._told, self._by_rank = told, Counter()
        return self._by_rank


def route_by_content() -> None:
    """Send requests about the same media to the same data-parallel rank."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    added_by: WeakKeyDictionary[Any, _Added] = WeakKeyDictionary()

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_core_engine_for_request(self: Any, request: Any) -> Any:
            told = self.lb_engines
            added = added_by.setdefault(self, _Added()).to(told)
            # A rank that the client names stands; vLLM routes pooling requests by itself.
            named = request.data_parallel_rank is not None
            if request.mm_features and not named and request.pooling_params is None:
                # The first item: a longer version of a video begins with the same segment.
                content = request.mm_features[0].identifier
                request.data_parallel_rank = rank_for(content, _loads(self, added))
            before = [waiting for waiting, *_ in told]
            chosen = original(self, request)
            for rank, (waiting, *_) in enumerate(told):
                added[rank] += waiting - before[rank]
            return chosen

        return get_core_engine_for_request

    wrap(DPLBAsyncMPClient, "get_core_engine_for_request", make)


def _loads(client: Any, added: Counter[int]) -> list[float]:
    """Requests of each rank: as vLLM's coordinator told last, and no fewer than are from here.

    vLLM counts those from here once more for each other API server. That is right where loads are
    only compared; here it would take two requests about a video for an overload, or a single text.

    Args:
        client: vLLM's client.
        added: What vLLM has added to the loads that the coordinator told.
    """
    return [
        max(client.engine_inflight[engine], waiting - added[rank] + running)
        for rank, (engine, (waiting, running, *_)) in enumerate(
            zip(client.core_engines, client.lb_engines, strict=False)
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
