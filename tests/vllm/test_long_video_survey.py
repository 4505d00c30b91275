"""The videos of a request about long video are read before anything is asked about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vllm_mm_ext.adapters.long_video.survey import Survey, opened
from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.fetcher import MediaChangedError, MediaRef
from vllm_mm_ext.media.fetch.source import Fetched
from vllm_mm_ext.policies.quality.videos import ContextUse

GROWN = b"a recording, and what came after"
Load = Callable[[Claim], Awaitable[Blob]]


def blob_of(content: bytes) -> Blob:
    with BlobWriter() as writer:
        writer.append(content)
        return writer.finish()


def survey_of(load: Load, budget: MediaBudget) -> Survey:
    claim = budget.claim()
    ref = MediaRef(Fetched("digest", len(GROWN), None), load, claim)
    claim.end()
    use = ContextUse(100, 0, 0)
    return Survey(("file:///a.ts",), (ref,), (60.0,), ("h264",), fits=False, context_use=use)


async def grew(_: Claim) -> Blob:
    raise MediaChangedError("The file changed while it was read; send it again.")


async def same(claim: Claim) -> Blob:
    blob = blob_of(GROWN)
    blob.hold(await claim.acquire(len(GROWN)))
    return blob


async def looked(*loads: Load, wanted: bool = True, budget: MediaBudget | None = None) -> Any:
    """What ``opened`` returns for surveys whose videos are read so, one after the other."""
    left = iter(loads)
    budget = budget or MediaBudget(1 << 20)

    async def look() -> Survey:
        return survey_of(next(left), budget)

    return await opened(look, lambda _: wanted, lambda work: work, budget)


async def test_a_recording_that_grew_after_it_was_probed_is_looked_at_again() -> None:
    found = await looked(grew, same)
    (content,) = found.contents
    assert (await content.open()).read() == GROWN


async def test_a_file_that_changes_all_the_time_is_the_clients_to_send_again() -> None:
    with pytest.raises(MediaChangedError):
        await looked(grew, grew, same)


async def test_what_is_answered_in_one_prompt_is_not_read_here() -> None:
    assert (await looked(grew, wanted=False)).fits is False


async def test_a_video_larger_than_the_media_budget_is_read_when_its_turn_has_come() -> None:
    budget = MediaBudget(len(GROWN) - 1, max_wait_s=0.1)
    for _ in range(2):  # Where the first request stayed the oldest, the second would have no turn.
        found = await looked(same, budget=budget)
        assert budget.used == len(GROWN)
        del found
