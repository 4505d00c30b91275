"""What model runners need to encode, beyond what vLLM sends them."""

from __future__ import annotations

from typing import Any


def send_all_inputs(scheduler: Any, output: Any) -> None:
    """Send new requests with the inputs of all their items.

    vLLM leaves out those of items whose KV is there. A V1 model runner gets nothing sent again when
    a request goes on after it was preempted, and if the KV is gone by then, it would have nothing
    to encode. V2 runners get such a request as a new one. Where the load of KV may fail and be made
    up for by computing it, requests go on without being preempted, and both need all inputs. Where
    that of an encoder output may fail, requests are preempted that would have ended.

    Args:
        scheduler: vLLM's scheduler.
        output: Its ``SchedulerOutput`` of a step, which is changed.
    """
    recomputes = scheduler.connector is not None and scheduler.recompute_kv_load_failures
    if scheduler.use_v2_model_runner and not recomputes:
        return
    overlaps = (
        scheduler.scheduler_config.async_scheduling
        or scheduler.parallel_config.pipeline_parallel_size > 1
    )
    may_fail = getattr(scheduler.ec_connector, "loads_may_fail", False)
    for new in output.scheduled_new_reqs:
        request = scheduler.requests[new.req_id]
        # A request that ends with this step, as a live session's do, is not preempted any more.
        ends = request.max_tokens == 1 and not (request.is_prefill_chunk or overlaps or may_fail)
        if recomputes or not ends:
            new.mm_features = request.mm_features
