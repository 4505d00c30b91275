"""One request's looks at windows: within its limits, with kept replies, and what came of each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from vllm_mm_ext.base.tasks import all_or_none
from vllm_mm_ext.long_video.asking import (
    Ask,
    AskFailedError,
    Cost,
    Look,
    Model,
    Reply,
    Window,
    filled,
)
from vllm_mm_ext.long_video.note_store import NoteStore
from vllm_mm_ext.long_video.notes import Entry, entries_of, lines_of
from vllm_mm_ext.long_video.task import Task


@dataclass(frozen=True)
class SeenWindow:
    """What came of looking at a window.

    Attributes:
        window: The window.
        entries: Its note.
        relevance: Chance that what is asked can be seen in it, 0 to 1; None where nobody asked.
        activity: How much happens in it, 0 to 1; None where the sampler did not look.
        is_close: The note is that of a second, closer look.
        is_kept: The note was kept from an earlier question.
        failed: Why it could not be looked at; None where it could.
        cost: What its prompts took.
        kept_cost: What those of its replies took, when they were made, that were kept.
    """

    window: Window
    entries: tuple[Entry, ...] = ()
    relevance: float | None = None
    activity: float | None = None
    is_close: bool = False
    is_kept: bool = False
    failed: str | None = None
    cost: Cost = field(default_factory=Cost)
    kept_cost: Cost = field(default_factory=Cost)

    @property
    def is_missing(self) -> bool:
        """Nothing is known of what the window shows."""
        return self.failed is not None and not self.entries

    @property
    def note(self) -> str:
        """The note with times on the video's clock."""
        return lines_of(self.entries)


@dataclass(frozen=True)
class Progress:
    """A look at a window has ended.

    Attributes:
        done: Looks that have ended.
        total: Looks that are planned, as far as is known.
        seen: The window, and what is known of it now.
    """

    done: int
    total: int
    seen: SeenWindow


class Looks:
    """Looks at windows for one request.

    What comes of the looks does not depend on the order in which they end, but for a bound on time.

    Args:
        task: What is asked, and the limits.
        model: Whom to ask.
        store: Keeps replies about windows.
        progress: Called when a look has ended.
    """

    def __init__(
        self, task: Task, model: Model, store: NoteStore, progress: Callable[[Progress], None]
    ) -> None:
        self.task = task
        self.model = model
        self.seen: dict[Window, SeenWindow] = {}
        self.left_out: set[Window] = set()
        self.text_cost = Cost()  # What prompts of text alone took.
        self._store = store
        self._progress = progress
        self._slots = asyncio.Semaphore(task.max_parallel)
        self._done = self._total = 0
        self._began = asyncio.get_running_loop().time()
        self._spent = 0  # Tokens of all prompts about windows.
        self._largest_prompt = 0  # Tokens of the largest one of the looks that `each` is at.

    async def each(
        self,
        windows: Sequence[Window],
        look_at: Callable[[Window], Awaitable[None]],
        *,
        at_once: int | None = None,
        share: float = 1.0,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Look at windows, many at once, until all are looked at or a bound is met.

        A window that fails is noted as failed, one past a bound as left out.

        Args:
            windows: The windows, in the order in which to begin.
            look_at: Looks at a window, by ``note`` or ``relevance``.
            at_once: Windows that are looked at before the next ones begin; None for no such limit.
            share: The part of the request's bounds on tokens and time that these looks may reach.
            until: Asked before windows begin; once it holds, none does, and they are not left out.
        """
        self._total += len(windows)
        self._largest_prompt = 0
        left = list(windows)
        while left and not until() and (count := self._affordable(share)):
            count = min(count, at_once or len(left))
            await all_or_none(self._one(window, look_at, share) for window in left[:count])
            del left[:count]
        if until():
            self._total -= len(left)
        else:
            self.left_out.update(left)

    async def note(self, window: Window, look: Look, earlier: str = "") -> None:
        """Get a note about a window.

        Args:
            window: The window.
            look: How closely to look.
            earlier: Notes of windows before it, which the model is told; may be empty.
        """
        reply, is_kept = await self._reply(window, look, self._note_ask(window, look, earlier))
        self._know_note(window, look, reply, is_kept)

    def recall(self, window: Window) -> None:
        """Take the closest note that an earlier question left about a window, if there is one."""
        for look in (self.task.close_look, self.task.note_look):
            if (reply := self._kept_note(window, look)) is not None:
                self._know_note(window, look, reply, is_kept=True)
                return

    def is_noted(self, window: Window) -> bool:
        """Whether an earlier question left the note about a window that serves any question.

        False also where this request may not be told.
        """
        return self._kept_note(window, self.task.note_look) is not None

    def _kept_note(self, window: Window, look: Look) -> Reply | None:
        key = self.model.known_window_key(window, look)
        ask = self._note_ask(window, look, "")
        return None if key is None else self._store.kept(self._key(key, ask))

    async def relevance(self, window: Window) -> None:
        """Get the chance that a window shows what is asked."""
        prompts = self.task.settings.prompts
        text = filled(prompts.relevance, question=self.task.question)
        choices = (prompts.yes, prompts.no)
        look = self.task.coarse_look
        reply, _ = await self._reply(window, look, Ask(window, look, (text,), 1, choices))
        yes, no = (reply.chances.get(choice, 0.0) for choice in choices)
        self._know(
            window,
            relevance=yes / (yes + no) if yes + no > 0 else 0.0,
            activity=reply.activity,
        )

    async def ask_texts(self, asks: Iterable[Ask]) -> list[Reply | None]:
        """Send prompts of text alone; None for one that failed."""
        return await all_or_none(self._ask_text(ask) for ask in asks)

    async def _ask_text(self, ask: Ask) -> Reply | None:
        async with self._slots:
            try:
                reply = await self.model.ask(ask)
            except AskFailedError:
                return None
        self.text_cost += reply.cost
        return reply

    async def _one(
        self, window: Window, look_at: Callable[[Window], Awaitable[None]], share: float
    ) -> None:
        async with self._slots:
            if self._is_late(share):
                self.left_out.add(window)
                return
            try:
                await look_at(window)
            except AskFailedError as error:
                self._know(window, failed=str(error))
        self._done += 1
        self._progress(Progress(self._done, self._total, self.seen[window]))

    async def _reply(self, window: Window, look: Look, ask: Ask) -> tuple[Reply, bool]:
        """The reply about a window, kept or new."""

        async def send() -> Reply:
            reply = await self.model.ask(ask)
            self._know(window, cost=self._seen(window).cost + reply.cost)
            self._spent += reply.cost.prompt_tokens
            self._largest_prompt = max(self._largest_prompt, reply.cost.prompt_tokens)
            return reply

        if not self.model.may_keep(window):
            return await send(), False
        key = self._key(await self.model.window_key(window, look), ask)
        reply, is_kept = await self._store.reply(key, send)
        if is_kept:
            self._know(window, kept_cost=self._seen(window).kept_cost + reply.cost)
        return reply, is_kept

    def _note_ask(self, window: Window, look: Look, earlier: str) -> Ask:
        prompts = self.task.settings.prompts
        texts = (
            (filled(prompts.earlier, notes=earlier), prompts.note) if earlier else (prompts.note,)
        )
        return Ask(window, look, texts, self.task.settings.note_tokens)

    def _key(self, window_key: str, ask: Ask) -> str:
        """Digest of everything that a reply about a window depends on."""
        about = (window_key, self.model.identity, ask.look, ask.texts, ask.max_tokens, ask.choices)
        return str(blake3(repr(about).encode()).hexdigest())

    def _affordable(self, share: float) -> int:
        """Windows that can be looked at now without going past the bound on tokens.

        What a prompt takes is known when it has ended, so the next prompts are taken to be as large
        as the largest one of these looks so far, and the first window is looked at alone.
        """
        if self.task.total_tokens is None:
            return len(self.task.windows)
        left = self.task.total_tokens * share - self._spent
        if left <= 0 or self._largest_prompt == 0:
            return int(left > 0)
        return min(self.task.max_parallel, int(left // self._largest_prompt))

    def _is_late(self, share: float) -> bool:
        passed = asyncio.get_running_loop().time() - self._began
        return self.task.time_s is not None and passed > self.task.time_s * share

    def _seen(self, window: Window) -> SeenWindow:
        return self.seen.get(window) or SeenWindow(window)

    def _know_note(self, window: Window, look: Look, reply: Reply, is_kept: bool) -> None:
        entries = tuple(entries_of(reply.text, window))
        is_close = look.kind == "close"
        self._know(window, entries=entries, is_close=is_close, is_kept=is_kept, failed=None)

    def _know(self, window: Window, **news: Any) -> None:
        self.seen[window] = replace(self._seen(window), **news)
