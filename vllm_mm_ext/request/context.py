"""The request that is being rendered: what it asks, and one record for each of its media items.

The plugin has one context variable, in this module. It is read where vLLM calls the plugin (routes,
media connector, preprocessing); from there on the context is passed on as an argument.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from vllm_mm_ext.config.options import DEFAULT_OPTIONS, RequestOptions
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.request.media_items import MediaItem, MediaModality
from vllm_mm_ext.request.trace import RequestTrace

# Reentrant: a garbage collection may end a request at any point.
_claim_lock = threading.RLock()


@dataclass(eq=False)
class RequestContext:
    """One request, or one of its conversations while that is rendered.

    Attributes:
        options: The request's `mm_ext` block; the defaults without one.
        session: The session that the request says it belongs to, if it says so.
        cache_salt: vLLM's field that keeps the request's prefix cache apart from others; what the
            plugin remembers of a conversation is kept apart by it too.
        renderer: vLLM's renderer at work; with several engines in a process it tells which
            front-end serves the request.
        items: The conversation's videos and audios, in the order of its messages.
        trace: What was done for the request; its conversations share it.
    """

    options: RequestOptions = DEFAULT_OPTIONS
    session: str | None = None
    cache_salt: str | None = None
    renderer: object | None = None
    items: list[MediaItem] = field(default_factory=list)
    trace: RequestTrace = field(default_factory=RequestTrace)
    _budget_claim: Claim | None = None

    def conversation(self, renderer: object, cache_salt: str | None) -> RequestContext:
        """The context of one conversation of this request; it has no items yet.

        Args:
            renderer: vLLM's renderer that renders the conversation.
            cache_salt: As the request names it.
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
        """The item that vLLM asks for.

        vLLM's chat parser names an item by its URL alone and asks for the items of a conversation
        in the order of the messages. So a claim takes the first item of that URL which nobody has
        claimed; where none is left, a new one is made.

        Args:
            modality: What vLLM asks for.
            url: As the request spells it.
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
