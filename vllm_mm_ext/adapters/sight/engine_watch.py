"""Puts a ``StepObserver`` into each of vLLM's schedulers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_mm_ext.adapters.names.sight_names import STEP_NAMES
from vllm_mm_ext.adapters.patches import set_on, wrap
from vllm_mm_ext.adapters.vllm_compat import Feature, service_of
from vllm_mm_ext.base.shared_state import open_state
from vllm_mm_ext.config.root import MMExtConfig

if TYPE_CHECKING:
    from vllm_mm_ext.adapters.sight.step_observer import StepObserver

logger = logging.getLogger("vllm.mm_ext")


def install() -> None:
    """Observe the steps of every scheduler that is built from now on. Idempotent."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "__init__", _observed)
    wrap(Scheduler, "schedule", _scheduling)
    wrap(Scheduler, "update_from_output", _updating)
    wrap(Scheduler, "shutdown", _ending)


def _observed(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        set_on(self, "vllm.v1.core.sched.scheduler:Scheduler.mm_ext_steps", _observer_of(self))

    return init


def _observer_of(scheduler: Any) -> StepObserver | None:
    """An observer for a scheduler; None where nobody reads what it would publish."""
    from vllm_mm_ext.adapters.sight.step_observer import StepObserver

    config = scheduler.vllm_config
    wanted = MMExtConfig.from_additional_config(config.additional_config).sight.metrics
    service = service_of(config.model_config)
    if not (wanted and scheduler.log_stats and service):
        return None
    try:
        return StepObserver(scheduler, open_state(service))
    except OSError as error:
        logger.warning("mm_ext: metrics lack what the engine does: %s", error)
        return None


def _scheduling(original: Callable[..., Any]) -> Callable[..., Any]:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self.mm_ext_steps is not None:
            self.mm_ext_steps.scheduled(output)
        return output

    return schedule


def _updating(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, scheduler_output, *args, **kwargs)
        if self.mm_ext_steps is not None:
            self.mm_ext_steps.finished(scheduler_output)
        return outputs

    return update_from_output


def _ending(original: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(self: Any) -> None:
        if self.mm_ext_steps is not None:
            self.mm_ext_steps.close()
            set_on(self, "vllm.v1.core.sched.scheduler:Scheduler.mm_ext_steps", None)
        original(self)

    return shutdown


ENGINE_FIGURES_FEATURE = Feature(
    "engine figures", "/metrics lacks what the engines do", STEP_NAMES, install
)
