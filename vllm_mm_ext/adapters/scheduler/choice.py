"""Which class ``--scheduler-cls`` stands for, and what it cannot do with an engine."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

from vllm_mm_ext.adapters.names.names_check import problem
from vllm_mm_ext.adapters.names.scheduler_names import (
    CADENCE_ATTRIBUTES,
    QUEUE_METHODS,
    SCHEDULER_NAMES,
)

logger = logging.getLogger("vllm.mm_ext")

WITHOUT_SCHEDULER = "videos stall text, and a request that waits for the encoder holds a slot"


def scheduler_class() -> Any:
    """The plugin's scheduler; stock's if vLLM has changed underneath, with one warning."""
    problem = scheduler_problem()
    if problem is not None:
        logger.warning(
            "mm_ext: 'scheduler' is off, stock vLLM behaviour is used instead (%s): %s",
            WITHOUT_SCHEDULER,
            problem,
        )
        return stock_scheduler
    from vllm_mm_ext.adapters.scheduler.mm_scheduler import MMExtScheduler

    return MMExtScheduler


def scheduler_problem() -> str | None:
    """What of vLLM is not as the plugin's scheduler needs it; None if all is."""
    return problem(SCHEDULER_NAMES) or _changed_interfaces()


def _changed_interfaces() -> str | None:
    """What is missing of vLLM's prefill cadence, or wanted of queues beyond what is known."""
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler

    known = inspect.unwrap(Scheduler.__init__).__code__.co_names
    cadence = [name for name in CADENCE_ATTRIBUTES if name in known]
    if cadence and len(cadence) < len(CADENCE_ATTRIBUTES):
        return f"of vLLM's prefill cadence only {', '.join(cadence)} is there"
    unknown = RequestQueue.__abstractmethods__ - set(QUEUE_METHODS)
    return f"vLLM's queues have {', '.join(sorted(unknown))} now" if unknown else None


def stock_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """What vLLM builds without ``--scheduler-cls``."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    asynchronous = vllm_config.scheduler_config.async_scheduling
    return (AsyncScheduler if asynchronous else Scheduler)(vllm_config, *args, **kwargs)


def start_warnings(scheduler: Any) -> Iterator[str]:
    """What the plugin's scheduler has off, or what costs more than an operator would expect."""
    if scheduler.is_encoder_decoder:
        yield "encoder work of encoder-decoder models is left to vLLM"
    if scheduler.connector is not None:
        yield (
            "requests with media whose KV a connector has wait for their turn at the "
            "encoder before it is asked, unless their kv_transfer_params say do_remote_prefill"
        )
    slots = int(scheduler.max_num_active_reqs)
    if scheduler._settings.text_slots > slots // 4:
        yield (
            f"scheduler.text_slots is {scheduler._settings.text_slots}, but at most a quarter of "
            f"the {slots} slots (--max-num-seqs) is kept for text: {slots // 4}"
        )
    if getattr(scheduler, CADENCE_ATTRIBUTES[0], 1) > 1:
        yield (
            "--prefill-schedule-interval holds back prompts and encoder work, which the "
            "scheduler spreads between decodes already: first tokens come later"
        )
    if not scheduler._limits_prefill:
        yield (
            "prefill is not limited while something decodes: chunked prefill is off, "
            "mm items must not be chunked, or prompts are computed in whole Mamba blocks"
        )
