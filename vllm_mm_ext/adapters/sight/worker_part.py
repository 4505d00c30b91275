"""A worker's part of a takedown: encoder outputs, KV blocks and buffers of its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_mm_ext.base.heap_scrub import clear_what_is_freed, scrub


# Encoders make tensors that can be overwritten in this mode only.
@torch.inference_mode()  # type: ignore[untyped-decorator]
def take_down(worker: Any, identifiers: Sequence[str], blocks: Sequence[int]) -> tuple[int, bool]:
    """Overwrite and drop what a worker holds of some mm items; called between two steps.

    Args:
        worker: vLLM's worker.
        identifiers: vLLM's identifiers of the items. No request uses them.
        blocks: KV blocks of theirs, which are free.

    Returns:
        Number of encoder outputs that were dropped, and whether the blocks were overwritten.
    """
    if torch.accelerator.is_available():
        # What the last step copies is not overwritten under its hands.
        torch.accelerator.synchronize()
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
    zeroed = zero_blocks(runner, list(blocks))
    if torch.accelerator.is_available():
        # Freed tensors stay in the allocators, with what they held.
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        torch._C._host_emptyCache()
    scrub()
    return dropped, zeroed


def begin(worker: Any) -> None:  # noqa: ARG001 - vLLM passes its worker
    """Prepare the process of a worker for takedowns."""
    clear_what_is_freed()


def ignore(worker: Any, filling: bytes) -> None:
    """Take a message that is there to overwrite what was in its place."""


def zero_blocks(runner: Any, blocks: list[int]) -> bool:
    """Overwrite KV blocks with zeros.

    Args:
        runner: vLLM's model runner.
        blocks: Ids of the blocks.

    Returns:
        False where vLLM has nothing that overwrites them.
    """
    if not blocks:
        return True
    made = getattr(runner, "kv_block_zeroer", None) or getattr(runner, "_kv_block_zeroer", None)
    if runner.device.type != "cpu" and made is None:
        # vLLM makes it for those models only whose blocks it overwrites itself.
        runner._init_kv_zero_meta()
    # vLLM's second runner has the one, its first one the other.
    if (zeroer := getattr(runner, "kv_block_zeroer", None)) is not None:
        zeroer.zero_block_ids(blocks)
    elif hasattr(runner, "_zero_block_ids"):
        runner._zero_block_ids(blocks)
    else:
        return False
    # Neither knows the states of Mamba layers.
    return not runner.kv_cache_config.has_mamba_layers


def _forget_on_host(identifiers: Sequence[str]) -> None:
    """Drop items from the worker's side of the host tier, where it has one of its own."""
    from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer

    connector = get_ec_transfer() if has_ec_transfer() else None
    if (forget := getattr(connector, "forget_in_worker", None)) is not None:
        forget(identifiers)
