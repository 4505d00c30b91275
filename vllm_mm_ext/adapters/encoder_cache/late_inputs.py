"""Workers get what an encoder takes with the step that encodes it, and not with the request.

vLLM hands all mm items of a request to the workers once, with the request's first step, and a V1
model runner keeps them until the request ends. Where workers are processes of their own, that is a
copy of all pixels to each of them, also for a follow-up question that finds everything in caches.
So the scheduler holds large inputs back, and sends them with each step that is to encode them,
however late that is: after a preemption, or when an encoder output was evicted. A worker has them
for that step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from vllm_mm_ext.adapters.names.scheduler_names import LATE_INPUTS_NAMES
from vllm_mm_ext.adapters.patches import ledger, set_on, wrap
from vllm_mm_ext.adapters.vllm_compat import Feature

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_NAME: Final = "late inputs"
LATE: Final = "mm_ext_inputs"
"""Attribute of a ``SchedulerOutput``: by request and place of the item, what is to be encoded."""

# Bytes up to which a field goes with the request. Positions of M-RoPE follow from such fields, and
# not every model marks them as ``keep_on_cpu``.
_SMALL: Final = 16 << 10


def install() -> None:
    """Have workers look for inputs in the steps that they execute. Idempotent."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrap(WorkerWrapperBase, "execute_model", _with_late_inputs)


def applies(vllm_config: VllmConfig) -> bool:
    """Whether inputs may be held back: it saves a copy, and the workers take them later.

    Workers that the ``mp`` executor starts load the plugins that this process has loaded; those of
    other nodes were started by somebody else. V2 model runners are sent nothing that they do not
    need, as vLLM sends them a preempted request again.
    """
    # First of all: without the feature the other names may not be there.
    if _NAME not in ledger():
        return False
    parallel = vllm_config.parallel_config
    return (
        parallel.distributed_executor_backend == "mp"
        and parallel.nnodes == 1
        and not vllm_config.use_v2_model_runner
        # Such a model has no encoder: it takes the inputs themselves, in a request's first step.
        and not vllm_config.model_config.is_multimodal_raw_input_only_model
    )


def send_late(output: Any, requests: Mapping[str, Any]) -> None:
    """Take large inputs out of a step's new requests, and put in those that it encodes.

    Args:
        output: vLLM's ``SchedulerOutput``.
        requests: All requests of the scheduler by id; they keep their inputs.
    """
    for new in output.scheduled_new_reqs:
        new.mm_features = [without_inputs(one) for one in requests[new.req_id].mm_features]
    late: dict[str, dict[int, Any]] = {}
    for key, indices in output.scheduled_encoder_inputs.items():
        features = requests[key].mm_features
        found = {index: features[index].data for index in indices if _is_late(features[index])}
        if found:
            late[key] = found
    if late:
        set_on(output, "vllm.v1.core.sched.output:SchedulerOutput.mm_ext_inputs", late)


def send_all(output: Any, requests: Mapping[str, Any]) -> None:
    """Send new requests to V1 model runners with the inputs of all their items.

    vLLM leaves out those of items whose KV is there. A V1 runner gets nothing sent again when a
    request goes on after it was preempted, and if the KV is gone by then, it would have nothing to
    encode. V2 runners get such a request as a new one.

    Args:
        output: vLLM's ``SchedulerOutput``.
        requests: All requests of the scheduler by id.
    """
    for new in output.scheduled_new_reqs:
        new.mm_features = requests[new.req_id].mm_features


def without_inputs(feature: Any) -> Any:
    """An mm feature as it goes with a request: what is small of it, from which positions follow."""
    if not _is_late(feature):
        return feature
    small = {name: one for name, one in feature.data.items() if not _is_large(one)}
    return replace(feature, data=type(feature.data)(small))


def _is_late(feature: Any) -> bool:
    return feature.data is not None and any(map(_is_large, feature.data.values()))


def _is_large(element: Any) -> bool:
    return not element.field.keep_on_cpu and _size(element.data) > _SMALL


def _size(data: Any) -> int:
    if isinstance(data, list | tuple):
        return sum(map(_size, data))
    return int(getattr(data, "nbytes", 0))


def _with_late_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        late = getattr(scheduler_output, LATE, None)
        if not late:
            return original(self, scheduler_output)
        sent = {new.req_id: new.mm_features for new in scheduler_output.scheduled_new_reqs}
        held = self.worker.model_runner.requests
        before = []
        for key, inputs in late.items():
            # The runner keeps the list that comes with a new request.
            features = sent[key] if key in sent else held[key].mm_features
            for index, data in inputs.items():
                before.append((features, index, features[index]))
                features[index] = replace(features[index], data=data)
        try:
            return original(self, scheduler_output)
        finally:
            for features, index, feature in before:
                features[index] = feature

    return execute_model


LATE_INPUTS_FEATURE = Feature(
    _NAME,
    "each request takes all its pixels to workers that are other processes, whatever is cached",
    LATE_INPUTS_NAMES,
    install,
)
