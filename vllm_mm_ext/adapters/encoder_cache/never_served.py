"""Requests that vLLM's own encoder cache never has room for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm_mm_ext.adapters.encoder_cache.mm_features import sharing
from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.policies.scheduler.step_plan import Item


def is_prefilled_elsewhere(scheduler: Any, request: Any) -> bool:
    """Whether the KV of a request that has not begun comes from another node.

    A connector takes the mark away once the transfer has begun.
    """
    params = request.kv_transfer_params or {}
    return scheduler.connector is not None and bool(params.get("do_remote_prefill"))


def refuse_what_never_fits(
    scheduler: Any, request: Any, missing: Sequence[Item] | None = None
) -> bool:
    """End a request whose video and sound together are more than vLLM's own encoder cache holds.

    vLLM checks the size of each item by itself, and prefill needs all items of a placeholder at
    once. So the request would wait for ever, and all encoder work behind it. The plugin's manager
    takes such items.

    Args:
        scheduler: vLLM's scheduler.
        request: A request with media.
        missing: The items that it now needs and that must be encoded here; None of one that comes.
            What was prefilled elsewhere when the request came may have got lost since.

    Returns:
        Whether the request ends.
    """
    if scheduler.is_encoder_decoder or hasattr(scheduler.encoder_cache_manager, "overdraws"):
        return False
    if request.request_id in scheduler.encoder_cache_mismatch_reqs:
        # It ends with the step that is under way.
        return True
    features = request.mm_features
    if missing is not None:
        # The others are asked about when it is their turn.
        looked_at: Iterable[int] = (item.index for item in missing[:1])
    else:
        looked_at = () if is_prefilled_elsewhere(scheduler, request) else range(len(features))
    for index in looked_at:
        while sharing(features, index)[0]:
            index -= 1
        needed = (features[index], *sharing(features, index)[1])
        embeds = sum(one.mm_position.get_num_embeds() for one in needed)
        if len(needed) > 1 and embeds > scheduler.max_num_encoder_input_tokens:
            logger.error(
                "mm_ext: request %s cannot be served: a video and its sound have %d embeddings "
                "together, and vLLM's encoder cache holds %d. The plugin's encoder cache "
                "(--ec-manager-config) takes them",
                request.request_id,
                embeds,
                scheduler.max_num_encoder_input_tokens,
            )
            scheduler.encoder_cache_mismatch_reqs.add(request.request_id)
            return True
    return False
