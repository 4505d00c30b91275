"""The videos of a request about long video are read before anything is asked about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vllm_mm_ext.adapters.long_video.survey import Survey, opened
from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.media.fetch.fetcher import MediaChangedError, MediaRef
from vllm_mm_ext.media.fetch.source import Fetched

GROWN = b"a recording, and what came after"


def blob_of(content: bytes) -> Blob:
    with BlobWriter() as writer:
        writer.append(content)
        return writer.finish()


def survey_of(load: Callable[[], Awaitable[Blob]]) -> Survey:
    ref = MediaRef(Fetched("digest", len(GROWN), None), load, MediaBudget(1 << 20, 1.0).claim())
    return Survey(("file:///a.ts",), (ref,), (60.0,), fits=False, room=100)


async def grew() -> Blob:
    raise MediaChangedError("The file changed while it was read; send it again.")


async def same() -> Blob:
    return blob_of(GROWN)


async def looked(*loads: Callable[[], Awaitable[Blob]], wanted: bool = True) -> Any:
    """What ``opened`` returns for surveys whose videos are read so, one after the other."""
    left = iter(loads)

    async def look() -> Survey:
        return survey_of(next(left))

    return await opened(look, lambda _: wanted, lambda work: work)


async def test_a_recording_that_grew_after_it_was_probed_is_looked_at_again() -> None:
    found = await looked(grew, same)
    (content,) = found.contents
    assert (await content.open()).read() == GROWN


async def test_a_file_that_changes_all_the_time_is_the_clients_to_send_again() -> None:
    with pytest.raises(MediaChangedError):
        await looked(grew, grew, same)


async def test_what_is_answered_in_one_prompt_is_not_read_here() -> None:
    assert (await looked(grew, wanted=False)).fits is False
