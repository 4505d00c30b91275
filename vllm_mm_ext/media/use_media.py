"""Media by URL put to use, and once more where the content behind the URL has just changed."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.fetcher import MediaChangedError, MediaFetcher, MediaRef

R = TypeVar("R")


@dataclass(frozen=True)
class MediaUse(Generic[R]):
    """What came of a use.

    Attributes:
        content: The media that was used.
        result: What the use returned.
        fetch_s: Seconds until the content was known.
        use_s: Seconds of the use itself.
    """

    content: MediaRef
    result: R
    fetch_s: float
    use_s: float


async def use_media(
    fetcher: MediaFetcher,
    url: str,
    use: Callable[[MediaRef], Awaitable[R]],
    *,
    claim: Claim,
    content: MediaRef | None = None,
    timeout_s: float,
    max_bytes: int | None = None,
) -> MediaUse[R]:
    """Resolve ``url`` and use what is there.

    Where the content changes meanwhile, both are done once more with what is there then.

    Args:
        fetcher: Resolves the URL.
        url: As the request spells it.
        use: Probes or decodes the media.
        claim: Of the request, on the media budget.
        content: What the URL was resolved to before, which saves the first resolving.
        timeout_s: Seconds for the first attempt to download.
        max_bytes: Limit on the encoded size; None for the fetcher's own.

    Raises:
        MediaError: As the fetcher and ``use`` raise it.
    """

    async def resolve() -> MediaRef:
        return await fetcher.resolve(url, timeout_s=timeout_s, max_bytes=max_bytes, claim=claim)

    started = time.perf_counter()
    try:
        # A file may also change while it is resolved, since it is read then.
        if content is None:
            content = await resolve()
        fetched = time.perf_counter()
        result = await use(content)
    except MediaChangedError:
        content = await resolve()
        fetched = time.perf_counter()
        result = await use(content)
    return MediaUse(content, result, fetched - started, time.perf_counter() - fetched)
