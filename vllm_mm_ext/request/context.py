"""The request that is being rendered: what it asks for, and one record for each media item.

This module has the plugin's only context variable. The plugin reads it where vLLM calls the plugin
(routes, media connector, preprocessing), and from there on passes the context as an argument.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vllm_mm_ext.config.options import DEFAULT_OPTIONS, RequestOptions
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.request.media_items import MediaItem, MediaModality
from vllm_mm_ext.request.trace import RequestTrace

# Reentrant: a garbage collection may end a request at any point.
_claim_lock = threading.RLock()


class EncodeJob(Protocol):
    """What an encoder instance may be asked to do for a request.

    Attributes:
        name: Names it to the engine, which waits for what it is to bring; None for no wait.
        takes_records: Videos may be taken by the record that an encoder writes of them.
        used_records: How many videos were.
        whole: Begins to render the request's conversation again, with all its videos decoded; None
            where that is not needed.
    """

    name: str | None
    takes_records: bool
    used_records: int
    whole: Callable[[], asyncio.Task[Any]] | None

    @property
    def is_open(self) -> bool:
        """Whether an encoder is at work."""

    def begin(self, levels: Sequence[int], item_tokens: int) -> None:
        """Ask for it, now that the load tier of each video is decided, and how large items are."""

    def end(self) -> None:
        """Stop asking: the request has ended."""


@dataclass(eq=False)
class RequestContext:
    """One request, or one conversation of a request while vLLM renders it.

    Attributes:
        options: The request's `mm_ext` block; the defaults if the request has none.
        session: Id of the session that the request names; None if it names none.
        cache_salt: vLLM's request field of that name. Requests with different salts share no prefix
            cache, and no decision that the plugin keeps about a conversation.
        renderer: vLLM's renderer at work. With several engines in a process it identifies the
            engine, and so the front-end that serves the request.
        items: The conversation's videos and audios, in the order of its messages.
        trace: What was done for the request; all conversations of the request share it.
        span: Start and end in seconds of the part of its videos that the request is about; None for
            whole videos. Only requests that the plugin makes itself have one.
        contents: The content behind URLs that need not be resolved; as ``span``.
        elsewhere: An encoder instance that may be asked to encode the request's media; None for
            most servers.
        levels: Load tiers of the request's videos that are decided already: by another instance
            for which this one encodes, or earlier in the same request; None where they are not.
        item_tokens: Tokens of an mm item at most, as another instance or the planning of the
            request has decided; 0 while they have not, and where there is no limit.
        disaggregated: One server prefills the request's prompt and another one answers it. Each
            plans the videos, and both must come to the same plan.
        unreported: The hashes of its mm items are all that is kept of it: a prompt of a live
            session.
        sends_once: Nothing needs its model inputs in the API server once the engine has them.
        silent: Its videos are shown without their sound.
        is_begun: A request has been read into it, so it is no other request's.
    """

    options: RequestOptions = DEFAULT_OPTIONS
    session: str | None = None
    cache_salt: str | None = None
    renderer: object | None = None
    items: list[MediaItem] = field(default_factory=list)
    trace: RequestTrace = field(default_factory=RequestTrace)
    span: tuple[float, float] | None = None
    contents: Mapping[str, MediaRef] = field(default_factory=dict)
    elsewhere: EncodeJob | None = None
    levels: tuple[int, ...] | None = None
    item_tokens: int = 0
    disaggregated: bool = False
    unreported: bool = False
    sends_once: bool = False
    silent: bool = False
    is_begun: bool = False
    _budget_claim: Claim | None = None

    def conversation(self, renderer: object, cache_salt: str | None) -> RequestContext:
        """The context of one conversation of this request, without items yet.

        Args:
            renderer: vLLM's renderer that renders the conversation.
            cache_salt: The request's ``cache_salt``.
        """
        return replace(self, renderer=renderer, cache_salt=cache_salt, items=[], _budget_claim=None)

    def budget_claim(self, budget: MediaBudget) -> Claim:
        """The one claim of the conversation's media on the media budget; ``end_claim`` ends it."""
        # Images ask on vLLM's event loop, videos and sound on the front-end's.
        with _claim_lock:
            if self._budget_claim is None:
                self._budget_claim = budget.claim()
            return self._budget_claim

    def end_claim(self) -> None:
        """Say that the conversation asks for no more bytes of the media budget."""
        with _claim_lock:
            claim, self._budget_claim = self._budget_claim, None
        if claim is not None:
            claim.end()

    def encode_elsewhere(self, levels: Sequence[int]) -> None:
        """Let an encoder instance begin, where there is one.

        Args:
            levels: The load tier of each planned video.
        """
        # What the plugin asks about a part of a video is encoded here.
        if self.elsewhere is not None and self.span is None:
            self.elsewhere.begin(levels, self.item_tokens)

    def limit_items(self, tokens: int) -> int:
        """Tokens of an mm item at most, here and at the instance for which this one encodes.

        Args:
            tokens: The limit here; 0 for none.
        """
        self.item_tokens = min(tokens, self.item_tokens or tokens)
        return self.item_tokens

    def claim_anew(self) -> None:
        """Forget which items vLLM has asked for: it begins anew."""
        for item in self.items:
            item.claimed = False
        self.trace.images.clear()
        self.trace.cached_tokens = None

    def add(self, items: Sequence[MediaItem]) -> None:
        """Append items; the request reports them in this order."""
        self.items += items
        self.trace.media += items

    def claim(
        self,
        modality: MediaModality,
        url: str,
        plan: Callable[[], VideoPlan | None] = lambda: None,
    ) -> MediaItem:
        """Find the item that vLLM asks for, and mark it as claimed.

        vLLM's chat parser asks for the items of a conversation in the order of the messages, and
        names each by its URL alone. So the first item of this URL that is not claimed yet is the
        one; if all are claimed, a new item is made.

        Args:
            modality: Modality of the item.
            url: URL of the item, as the request spells it.
            plan: Makes the plan of a new item.
        """
        for item in self.items:
            if not item.claimed and (item.modality, item.url) == (modality, url):
                break
        else:
            item = MediaItem(modality, url, plan())
            self.add([item])
        item.claimed = True
        return item


_current: ContextVar[RequestContext | None] = ContextVar("mm_ext_request", default=None)


def current_request() -> RequestContext | None:
    """The request that the running task or thread works for; None outside requests."""
    return _current.get()


def enter_request(context: RequestContext) -> RequestContext:
    """Make ``context`` the current one of the running task or thread, and return it."""
    _current.set(context)
    return context


@contextmanager
def claim_while_rendered() -> Iterator[None]:
    """End the current request's claim on the media budget on leaving: all its media are there."""
    try:
        yield
    finally:
        context = current_request()
        if context is not None:
            context.end_claim()
