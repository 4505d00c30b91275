"""Tokens of the texts of an event, counted before the event is dealt with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm_mm_ext.live.client_events import Role
from vllm_mm_ext.live.prompt import Message, Text


class TextCounts:
    """Measures messages, and remembers those of the texts that were counted ahead.

    To count the tokens of long texts, or of many, takes a while, so that is done in a thread. What
    then reads the event on the event loop finds the counts here.

    Args:
        measure: Tokens of a message.
        most_tokens: Of a prompt. An event with more is refused, and no more of its texts counted.
    """

    def __init__(self, measure: Callable[[Message], int], most_tokens: int) -> None:
        self._measure = measure
        self._most_tokens = most_tokens
        self._counted: dict[tuple[Role, str], int] = {}

    def measure(self, message: Message) -> int:
        """Tokens of a message."""
        counted = None
        if len(message.parts) == 1 and isinstance(message.parts[0], Text):
            counted = self._counted.get((message.role, message.parts[0].text))
        return self._measure(message) if counted is None else counted

    def count(self, texts: Iterable[tuple[Role, str]]) -> None:
        """Count the tokens of texts, each a message of its own, until ``forget``."""
        left = self._most_tokens
        for role, text in texts:
            tokens = self._counted[role, text] = self._measure(Message(role, (Text(text),)))
            left -= tokens
            if left < 0:
                return

    def forget(self) -> None:
        """Forget all counts."""
        self._counted = {}
