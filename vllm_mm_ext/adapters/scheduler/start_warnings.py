"""What an operator is told when the scheduler starts, of what it cannot do with this engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_mm_ext.adapters.names.scheduler_names import CADENCE_ATTRIBUTES
from vllm_mm_ext.config.scheduler_settings import SchedulerSettings


def start_warnings(
    scheduler: Any, settings: SchedulerSettings, *, limits_prefill: bool
) -> Iterator[str]:
    """What is off, or costs more than an operator would expect.

    Args:
        scheduler: vLLM's scheduler.
        settings: The section ``scheduler``.
        limits_prefill: Whether prefill can be limited while something decodes.
    """
    if scheduler.is_encoder_decoder:
        yield "encoder work of encoder-decoder models is left to vLLM"
    if scheduler.connector is not None:
        yield (
            "requests with media whose KV a connector has wait for their turn at the "
            "encoder before it is asked, unless their kv_transfer_params say do_remote_prefill"
        )
    slots = int(scheduler.max_num_active_reqs)
    if settings.text_slots > slots // 4:
        yield (
            f"scheduler.text_slots is {settings.text_slots}, but at most a quarter of the {slots} "
            f"slots (--max-num-seqs) is kept for text: {slots // 4}"
        )
    if getattr(scheduler, CADENCE_ATTRIBUTES[0], 1) > 1:
        yield (
            "--prefill-schedule-interval holds back prompts and encoder work, which the "
            "scheduler spreads between decodes already: first tokens come later"
        )
    if not limits_prefill:
        yield (
            "prefill is not limited while something decodes: chunked prefill is off, "
            "mm items must not be chunked, or prompts are computed in whole Mamba blocks"
        )
