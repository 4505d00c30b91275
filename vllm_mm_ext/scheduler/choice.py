"""Which class ``--scheduler-cls vllm_mm_ext.scheduler.MMExtScheduler`` stands for."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from vllm_mm_ext.vllm_compat import IncompatibleError
from vllm_mm_ext.vllm_names_scheduler import QUEUE_METHODS, SCHEDULER_ATTRIBUTES, SCHEDULER_NAMES

logger = logging.getLogger("vllm.mm_ext")


def scheduler_class() -> Any:
    """The plugin's scheduler; stock's if vLLM has changed underneath, with one warning."""
    try:
        for name in SCHEDULER_NAMES:
            name.check()
        _check_attributes()
    except IncompatibleError as error:
        logger.warning(
            "mm_ext: 'scheduler' is off, stock vLLM behaviour is used instead (videos stall text, "
            "and a request that waits for the encoder holds a slot): %s",
            error,
        )
        return stock_scheduler
    from vllm_mm_ext.scheduler.scheduler import MMExtScheduler

    return MMExtScheduler


def _check_attributes() -> None:
    """Raise unless vLLM's classes still have, and want, what is read, set and made here."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler

    for owner, names in ((Scheduler, SCHEDULER_ATTRIBUTES), (KVCacheManager, ("coordinator",))):
        known = inspect.unwrap(owner.__init__).__code__.co_names
        missing = [name for name in names if name not in known]
        if missing:
            raise IncompatibleError(f"vLLM's {owner.__name__} no longer has {', '.join(missing)}")
    unknown = RequestQueue.__abstractmethods__ - set(QUEUE_METHODS)
    if unknown:
        raise IncompatibleError(f"vLLM's queues have {', '.join(sorted(unknown))} now")


def stock_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """What vLLM builds without ``--scheduler-cls``."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    asynchronous = vllm_config.scheduler_config.async_scheduling
    return (AsyncScheduler if asynchronous else Scheduler)(vllm_config, *args, **kwargs)
