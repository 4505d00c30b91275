"""One response: what was written of it, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

from vllm_mm_ext.live import server_events
from vllm_mm_ext.live.effects import Usage
from vllm_mm_ext.live.server_events import Event, ResponseStatus
from vllm_mm_ext.live.session_items import Item, Scales, SessionItems, say


class LiveResponse:
    """A response under way.

    Args:
        response_id: Names it.
        answer: The item that it writes; within ``items`` it has its place already, not yet added.
        items: The conversation that the answer belongs to; None: to none.
        conversation_id: Of that conversation.
        max_output_tokens: As asked for.
        metadata: The client's.
        nbytes: Held for the response alone: its own input.
    """

    def __init__(
        self,
        response_id: str,
        answer: Item,
        items: SessionItems | None,
        conversation_id: str,
        max_output_tokens: int | Literal["inf"],
        metadata: Mapping[str, str] | None,
        nbytes: int,
    ) -> None:
        self.nbytes = nbytes
        self.response_id = response_id
        self.answer = answer
        self._items = items
        self._conversation_id = None if items is None else conversation_id
        self._max_output_tokens = max_output_tokens
        self._metadata = metadata
        self._chunks: list[tuple[tuple[int, ...], str]] = []
        # So far; None before the first token, when the engine has not told yet.
        self._usage: Usage | None = None

    @property
    def in_conversation(self) -> bool:
        """Whether the answer is an item of the conversation."""
        return self._items is not None

    def created(self) -> Event:
        """``response.created``."""
        return server_events.response_event(
            "response.created", self._shown("in_progress", None, [], None)
        )

    def write(self, token_ids: Sequence[int], text: str, usage: Usage) -> list[Event]:
        """Take the next tokens of the answer, and their text; ``usage``: up to here."""
        events = self._begin()
        self._usage = usage
        self._chunks.append((tuple(token_ids), text))
        if text:
            events.append(server_events.text_delta(self.response_id, self.answer.item_id, text))
        return events

    def complete(self, cut: bool, usage: Usage, scales: Scales) -> list[Event]:
        """The answer ended by itself; ``cut``: at its limit of tokens."""
        events = self._begin()
        if cut:
            details = {"reason": "max_output_tokens"}
            return events + self._end("incomplete", details, usage, scales)
        return events + self._end("completed", None, usage, scales)

    def cancel(
        self, reason: Literal["turn_detected", "client_cancelled"], scales: Scales
    ) -> list[Event]:
        """The answer was broken off; what was sent of it stays in the conversation."""
        return self._end("cancelled", {"reason": reason}, self._usage, scales)

    def fail(self, error_type: str, code: str, message: str, scales: Scales) -> list[Event]:
        """The answer could not be written to its end."""
        error = {"type": error_type, "code": code, "message": message}
        return self._end("failed", {"error": error}, self._usage, scales)

    def _begin(self) -> list[Event]:
        """Tell of the answer, the first time."""
        if self.answer.added:
            return []
        self.answer.added = True
        shown = self.answer.shown()
        events = [
            server_events.output_item_event("response.output_item.added", self.response_id, shown)
        ]
        if self._items is not None:
            previous = self._items.previous_id(self.answer)
            events.append(server_events.item_event("conversation.item.added", previous, shown))
        events.append(
            server_events.content_part_event(
                "response.content_part.added", self.response_id, self.answer.item_id, ""
            )
        )
        return events

    def _end(
        self, status: ResponseStatus, details: Event | None, usage: Usage | None, scales: Scales
    ) -> list[Event]:
        events: list[Event] = []
        output = []
        if self.answer.added:
            events, shown = self._end_item(status == "completed", scales)
            output = [shown]
        elif self._items is not None:
            self._items.remove(self.answer)
        done = self._shown(status, details, output, usage)
        return [*events, server_events.response_event("response.done", done)]

    def _end_item(self, completed: bool, scales: Scales) -> tuple[list[Event], Event]:
        with nullcontext() if self._items is None else self._items.changing(self.answer):
            say(self.answer, self._chunks, scales)
        self.answer.status = "completed" if completed else "incomplete"
        shown = self.answer.shown()
        text = self.answer.text
        item_id = self.answer.item_id
        events = [
            server_events.text_done(self.response_id, item_id, text),
            server_events.content_part_event(
                "response.content_part.done", self.response_id, item_id, text
            ),
        ]
        if self._items is not None:
            previous = self._items.previous_id(self.answer)
            events.append(server_events.item_event("conversation.item.done", previous, shown))
        events.append(
            server_events.output_item_event("response.output_item.done", self.response_id, shown)
        )
        return events, shown

    def _shown(
        self,
        status: ResponseStatus,
        details: Event | None,
        output: Sequence[Event],
        usage: Usage | None,
    ) -> Event:
        return server_events.response(
            self.response_id,
            conversation_id=self._conversation_id,
            status=status,
            details=details,
            output=output,
            max_output_tokens=self._max_output_tokens,
            metadata=self._metadata,
            usage=usage,
        )
