"""Estimates first tokens and throughput with the scheduler that would serve."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_mm_ext.adapters.names.estimate_names import ESTIMATE_NAMES
from vllm_mm_ext.adapters.names.names_check import problem
from vllm_mm_ext.adapters.names.scheduler_names import SCHEDULER_NAMES
from vllm_mm_ext.adapters.planning.loading import CannotPlanError
from vllm_mm_ext.adapters.planning.simulated_engine import EngineShape, SimulatedEngine
from vllm_mm_ext.planner.estimate import Estimate, Service, estimate, side_by_side
from vllm_mm_ext.planner.host_work import host_work
from vllm_mm_ext.planner.plan import Plan
from vllm_mm_ext.planner.rates import RatesRange
from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.workload import Workload

SCHEDULER = "vllm_mm_ext.scheduler.MMExtScheduler"


@dataclass(frozen=True)
class Serving:
    """One engine with its API server.

    Attributes:
        slots: ``--max-num-seqs``.
        step_tokens: ``--max-num-batched-tokens``.
        context: ``--max-model-len``.
        shape: Its KV and encoder caches.
        decode_workers: Decodes at a time.
        cores: Cores of the machine that both have.
        scheduler: The plugin's settings ``scheduler``.
    """

    slots: int
    step_tokens: int
    context: int
    shape: EngineShape
    decode_workers: int
    cores: int
    scheduler: dict[str, Any] = field(default_factory=dict)


def estimate_load(
    vllm_config: Any,
    serving: Serving,
    workload: Workload,
    request: RequestTokens,
    rates: RatesRange,
) -> Estimate:
    """Estimate what clients see of one engine.

    Args:
        vllm_config: vLLM's configuration for the model.
        serving: The engine.
        workload: What the clients ask; ``concurrency`` of them.
        request: What each request becomes.
        rates: What work costs.

    Raises:
        CannotPlanError: vLLM's scheduler is not as it is known.
        ValueError: The engine has no room for a request.
    """
    if (changed := problem((*SCHEDULER_NAMES, *ESTIMATE_NAMES))) is not None:
        raise CannotPlanError(f"this vLLM's scheduler cannot be simulated: {changed}")
    config = copy.deepcopy(vllm_config)
    config.scheduler_config.max_num_seqs = serving.slots
    config.scheduler_config.max_num_batched_tokens = serving.step_tokens
    config.scheduler_config.scheduler_cls = SCHEDULER
    config.additional_config = {"mm_ext": {"scheduler": serving.scheduler}}
    config.model_config.max_model_len = serving.context
    service = Service(
        workload.concurrency,
        host_work(workload, request),
        serving.decode_workers,
        serving.cores,
    )
    shape = serving.shape
    # More blocks than all slots can hold change nothing, and take long to make.
    most = 1 + serving.slots * request.kv_blocks(shape.block_size)
    shape = replace(shape, blocks=min(shape.blocks, most))
    return estimate(service, rates, lambda: SimulatedEngine(config, shape, request))


def estimate_plan(vllm_config: Any, plan: Plan, rates: RatesRange) -> Estimate:
    """Estimate what clients see of a plan's server.

    Replicas share the machine evenly, and the clients as evenly as their number allows.

    Args:
        vllm_config: vLLM's configuration for the model.
        plan: The plan.
        rates: What work costs.

    Raises:
        ValueError: The plan does not fit.
    """
    replicas = plan.site.dp
    serving = Serving(
        slots=plan.step.sequences,
        step_tokens=plan.step.tokens,
        context=plan.context,
        # vLLM gives the first block to nobody.
        shape=EngineShape(plan.block_size, plan.kv_blocks + 1, plan.step.encoder_tokens),
        decode_workers=plan.front.workers,
        cores=max(1, plan.site.cores // replicas),
        # As in the plan's file.
        scheduler={"text_slots": 0},
    )

    def with_clients(count: int) -> Estimate:
        workload = replace(plan.workload, concurrency=count)
        return estimate_load(vllm_config, serving, workload, plan.request, rates)

    fewest, more = divmod(plan.workload.concurrency, replicas)
    shares = (fewest + 1, more), (fewest, replicas - more)
    return side_by_side([(with_clients(n), count) for n, count in shares if n and count])
