"""A worker's part of a takedown: encoder outputs, KV blocks and buffers of its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_mm_ext.base.heap_scrub import clear_what_is_freed, scrub


# Encoders make tensors that can be overwritten in this mode only.
@torch.inference_mode()  # type: ignore[untyped-decorator]
def take_down(worker: Any, identifiers: Sequence[str], blocks: Sequence[int]) -> int:
    """Overwrite and drop what a worker holds of some mm items; called between two steps.

    Args:
        worker: vLLM's worker.
        identifiers: vLLM's identifiers of the items. No request uses them.
        blocks: KV blocks of theirs, which are free.

    Returns:
        Number of encoder outputs that were dropped.
    """
    runner = worker.model_runner
    cache = runner.encoder_cache
    # vLLM's second runner has an object around the tensors, or none without an encoder.
    outputs = cache if cache is None or isinstance(cache, dict) else cache.encoder_outputs
    dropped = 0
    for identifier in identifiers:
        output = None if outputs is None else outputs.pop(identifier, None)
        if output is not None:
            output.zero_()
            dropped += 1
    _forget_on_host(identifiers)
    zero_blocks(runner, list(blocks))
    if torch.accelerator.is_available():
        # Freed tensors stay in the allocators, with what they held.
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        torch._C._host_emptyCache()
    scrub()
    return dropped


def begin(worker: Any) -> None:  # noqa: ARG001 - vLLM passes its worker
    """Prepare the process of a worker for takedowns."""
    clear_what_is_freed()


def ignore(worker: Any, filling: bytes) -> None:
    """Take a message that is there to overwrite what was in its place."""


def zero_blocks(runner: Any, blocks: list[int]) -> None:
    """Overwrite KV blocks with zeros.

    Args:
        runner: vLLM's model runner.
        blocks: Ids of the blocks.
    """
    if not blocks:
        return
    if (zeroer := getattr(runner, "kv_block_zeroer", None)) is not None:
        zeroer.zero_block_ids(blocks)
    elif hasattr(runner, "_zero_block_ids"):
        runner._zero_block_ids(blocks)


def _forget_on_host(identifiers: Sequence[str]) -> None:
    """Drop items from the worker's side of the host tier, where it has one of its own."""
    from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer

    connector = get_ec_transfer() if has_ec_transfer() else None
    if (forget := getattr(connector, "forget_in_worker", None)) is not None:
        forget(identifiers)
