"""The plugin's scheduler with a log of its steps: what ``vllm-mm calibrate`` serves with."""

from __future__ import annotations

import json
import os
import time
from typing import Any, TextIO

from vllm_mm_ext.adapters.scheduler.choice import scheduler_class

# Names the file that steps are written to, a JSON object a line.
LOG_VARIABLE = "VLLM_MM_EXT_STEP_LOG"


def timed_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """The plugin's scheduler; each step is written to the file that ``LOG_VARIABLE`` names.

    For ``--scheduler-cls``; the arguments are those of vLLM's scheduler.
    """
    scheduler = scheduler_class()(vllm_config, *args, **kwargs)
    log = _StepLog(scheduler, open(os.environ[LOG_VARIABLE], "a", buffering=1))  # noqa: SIM115
    scheduler.schedule, scheduler.update_from_output = log.schedule, log.update
    return scheduler


class _StepLog:
    """Takes the times of steps and writes what they held.

    A step ends when vLLM takes in its output. It begins when the step before it ends, or when it is
    scheduled if the engine had nothing to do until then. So steps that vLLM schedules while another
    one runs count for the time that they add.
    """

    def __init__(self, scheduler: Any, file: TextIO) -> None:
        self._scheduler, self._file = scheduler, file
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        self._begun: dict[int, tuple[float, list[Any]]] = {}
        # End of the step before; None after an idle time.
        self._ended: float | None = None

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        output = self._schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self._begun[id(output)] = (now, self._contents(output))
        return output

    def update(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._update(output, *args, **kwargs)
        begun = self._begun.pop(id(output), None)
        if begun is not None:
            now = time.monotonic()
            scheduled, work = begun
            began = scheduled if self._ended is None else self._ended
            self._file.write(json.dumps({"began": began, "ended": now, "work": work}) + "\n")
            self._ended = now if self._scheduler.has_unfinished_requests() else None
        return result

    def _contents(self, output: Any) -> list[Any]:
        """Of each request its id, tokens, tokens before them, prompt tokens, and items encoded."""
        requests, work = self._scheduler.requests, []
        for key, tokens in output.num_scheduled_tokens.items():
            request = requests[key]
            # vLLM has counted the step's tokens as computed.
            before = request.num_computed_tokens - tokens
            items = list(output.scheduled_encoder_inputs.get(key, ()))
            work.append((key, tokens, before, request.num_prompt_tokens, items))
        return work
