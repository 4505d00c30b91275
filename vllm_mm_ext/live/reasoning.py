"""Reasoning that a model writes before its answer: clients and later prompts have the answer alone.

So it is in chat templates, which leave the reasoning of past answers out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: What models write around their reasoning.
BEGIN, END = "<think>", "</think>"


@dataclass(frozen=True)
class Reasoning:
    """How a model sets reasoning apart from its answer.

    Attributes:
        begin: The token ``BEGIN``.
        end: The token ``END``.
        special: The tokens are special ones, which vLLM leaves out of texts unless it is asked.
        begun: Prompts end with ``BEGIN``, so what the model writes first is reasoning.
        is_newline: Whether a token is line breaks alone.
    """

    begin: int
    end: int
    special: bool
    begun: bool
    is_newline: Callable[[int], bool]


class AnswerOnly:
    """Takes the reasoning off one answer as it is written, and the line breaks after it.

    Args:
        reasoning: How the model sets it apart.
    """

    def __init__(self, reasoning: Reasoning) -> None:
        self._marks = reasoning
        self._first = True
        self._reasons = reasoning.begun
        # The reasoning has ended, and nothing but line breaks has come since.
        self._leads = False

    def take(self, token_ids: tuple[int, ...], text: str) -> tuple[tuple[int, ...], str]:
        """The part of what was written that is the answer.

        Args:
            token_ids: What was written since the last time.
            text: The same as text.
        """
        if self._first and token_ids:
            self._first = False
            self._reasons |= token_ids[0] == self._marks.begin
        if self._reasons:
            if self._marks.end not in token_ids:
                return (), ""
            token_ids = token_ids[token_ids.index(self._marks.end) + 1 :]
            text = text.partition(END)[2]
            self._reasons, self._leads = False, True
        if self._leads:
            while token_ids and self._marks.is_newline(token_ids[0]):
                token_ids = token_ids[1:]
            text = text.lstrip("\n")
            self._leads = not token_ids
        return token_ids, text
