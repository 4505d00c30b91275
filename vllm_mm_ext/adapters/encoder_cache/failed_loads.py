"""What an engine does when the file of an encoder output cannot be read after all.

The worker finds out in the step that needs the output. It puts zeros in its place, and says so with
what the step brings. Whatever was computed with these is dropped before anybody sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorWorkerMetadata
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.patches import wrap
from vllm_mm_ext.adapters.vllm_compat import logger


@dataclass(frozen=True)
class FailedLoads(ECConnectorWorkerMetadata):  # type: ignore[misc]
    """Tells the scheduler of outputs that a worker could not read.

    Attributes:
        keys: Their identifiers.
    """

    keys: frozenset[str]

    def aggregate(self, other: ECConnectorWorkerMetadata) -> FailedLoads:
        """What one or the other worker could not read."""
        assert isinstance(other, FailedLoads)
        return FailedLoads(self.keys | other.keys)


def install() -> None:
    """Have schedulers start anew after a failed load. Idempotent."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "update_from_output", _recovering)


def _recovering(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        told = model_runner_output.ec_connector_output
        failed = told.ec_connector_worker_meta if told else None
        if isinstance(failed, FailedLoads):
            _start_anew(self, failed.keys)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output


def _start_anew(scheduler: Any, keys: frozenset[str]) -> None:
    """Let all requests begin again, without what could not be read and without cached KV.

    KV of several requests and later steps may be made of it. This is rare, so nothing tells apart.

    Raises:
        RuntimeError: A KV connector may have passed such KV on.
    """
    if scheduler.connector is not None:
        raise RuntimeError("mm_ext: KV made without an encoder output may be in a KV connector")
    logger.error("mm_ext: encoder outputs cannot be read, all requests are computed again")
    for request in scheduler.kv_holding_waiting:
        # Of sessions, which vLLM resets no KV beside. One whose next input has come begins again.
        scheduler._free_request_blocks(request)
        scheduler.encoder_cache_manager.free(request)
        request.num_computed_tokens = 0
        if request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            # vLLM 0.32 takes what is not computed of one from its text, so it ends with an error.
            scheduler.encoder_cache_mismatch_reqs.add(request.request_id)
    scheduler.reset_prefix_cache(reset_running_requests=True)
    for request in scheduler.requests.values():
        # vLLM delivers what steps under way bring to a request that was preempted before.
        request.drop_stale_output |= request.num_stale_output_tokens > 0
    scheduler.encoder_cache_manager.give_up(keys)
    scheduler.ec_connector.give_up(keys)
