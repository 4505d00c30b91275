"""Encodes for a request what the step's plan gives it, within vLLM's ``schedule``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_mm_ext.adapters.scheduler.media_work import MediaWork
from vllm_mm_ext.policies.scheduler.step_plan import Item

# What vLLM's ``_try_schedule_encoder_inputs`` returns: indices of the items to encode, prompt
# tokens to compute, encoder budget, items that a connector loads, and items that occur repeatedly.
Scheduled = tuple[list[int], int, int, list[int], list[int]]


class EncoderInputs:
    """Schedules planned encoder work, that beyond the request's prefill included.

    Args:
        scheduler: vLLM's scheduler.
        media: Encoder work by request.
    """

    def __init__(self, scheduler: Any, media: MediaWork) -> None:
        self._scheduler = scheduler
        self._media = media

    def schedule(
        self,
        stock: Callable[..., Scheduled],
        request: Any,
        planned: tuple[Item, ...],
        computed: int,
        tokens: int,
        shift: int,
    ) -> Scheduled:
        """What a request encodes and computes in this step.

        Args:
            stock: vLLM's ``_try_schedule_encoder_inputs``.
            request: The request.
            planned: The request's items in the step's plan.
            computed: Tokens of the request that are computed, or found by now.
            tokens: Tokens that the request is to compute.
            shift: Tokens that a drafter reads ahead.

        Returns:
            As vLLM's method; instead of the budget left, what was spent.
        """
        # KV that has turned up since, in the prefix cache or a connector, needs no encoder outputs.
        given = tuple(item for item in planned if item.end > computed)
        own = sum(item.tokens for item in given)
        # vLLM wants a budget for these and takes nothing from it.
        free = self._media.from_elsewhere(request, computed, computed + tokens + shift)
        items, tokens, left, external, duplicates = stock(
            request, computed, tokens, own + free, shift
        )
        left -= free
        if left < 0 < free:
            cut = self._unpaid(request, items, own)
            start = request.mm_features[cut].mm_position.offset
            tokens = min(tokens, max(0, start - computed - shift))
            items, external, duplicates = (
                [index for index in indices if index < cut]
                for indices in (items, external, duplicates)
            )
            left = own - sum(request.get_num_encoder_embeds(index) for index in items)
            # What was found behind must not hold the space that is lacking before it, for good.
            manager = self._scheduler.encoder_cache_manager
            for index in list(manager.get_cached_input_ids(request)):
                if index >= cut:
                    manager.free_encoder_input(request, index)
        if tokens:
            taken = {*items, *external, *duplicates}
            left = self._look_ahead(request, computed, given, items, taken, left)
        return items, tokens, own - left, external, duplicates

    @staticmethod
    def _unpaid(request: Any, items: list[int], own: int) -> int:
        """The first of the items that what the plan gives does not cover."""
        for index in items:
            own -= request.get_num_encoder_embeds(index)
            if own < 0:
                return index
        raise ValueError("all are covered")

    def _look_ahead(
        self,
        request: Any,
        computed: int,
        given: tuple[Item, ...],
        items: list[int],
        taken: set[int],
        left: int,
    ) -> int:
        """Add planned items that prefill does not reach yet; returns what is left to spend.

        None is added behind one that was cached when the plan was made and has made way since: what
        the request holds by then could be the space that it needs for that one, for good.
        """
        manager = self._scheduler.encoder_cache_manager
        known = {request.mm_features[index].identifier for index in taken}
        scheduled = sum(request.get_num_encoder_embeds(index) for index in taken)
        planned = {item.index for item in given}
        last = max(planned, default=-1)
        for item in self._media.items(request, computed):
            if item.index > last:
                break
            if item.index in taken or item.digest in known or not item.tokens:
                continue
            if manager.check_and_update_cache(request, item.index):
                continue
            if item.index not in planned:
                break
            if not manager.can_allocate(request, item.index, left, scheduled):
                break
            items.append(item.index)
            known.add(item.digest)
            scheduled += item.tokens
            left -= item.tokens
        return left
