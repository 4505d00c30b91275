"""The rules and constants of KV value that ``kv-replay --ablate`` changes, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

from vllm_mm_ext.adapters.kv import block_pool, tagging
from vllm_mm_ext.policies.eviction import reuse, reuse_history
from vllm_mm_ext.policies.kv import pieces, retention

# Constants, and what each is multiplied by.
_CONSTANTS: tuple[tuple[str, Any, str, tuple[float, ...]], ...] = (
    ("chance of a reuse before anything is known", reuse, "_PRIOR", (0.5, 2.0)),
    ("weight of that", reuse, "_ALL", (0.5, 2.0)),
    ("weight of all against a kind", reuse, "_KIND", (0.5, 2.0, 1e9)),
    ("weight of a class against the next", reuse, "_FACTOR", (0.3, 0.5, 2.0)),
    ("rounds of fitting", reuse, "_ROUNDS", (0.5, 2.0)),
    ("memory", reuse, "_MEMORY", (0.5, 2.0)),
    ("uses before the first lesson", reuse_history, "_FIRST_LESSON", (0.5, 2.0)),
    ("uses between lessons", reuse_history, "_LESSON", (0.5, 2.0)),
    ("share of uses of what is shared", reuse_history, "_SHARED", (0.5, 1.5, 1e9)),
    ("pieces ranked at a time", retention, "_DRAWN", (0.5, 2.0)),
    ("share given up ahead of need", block_pool, "_AHEAD", (0.5, 2.0)),
    ("cost of encoding", pieces, "ENCODE_COST", (0.0, 0.5, 2.0)),
)


def _scaled(owner: Any, name: str, by: float) -> AbstractContextManager[Any]:
    now = getattr(owner, name)
    return mock.patch.object(owner, name, int(now * by) if isinstance(now, int) else now * by)


def _levels(change: Callable[[list[float]], list[float]]) -> AbstractContextManager[Any]:
    return mock.patch.object(retention, "LEVELS", tuple(change(list(retention.LEVELS))))


def _kinds(change: Callable[[int], int]) -> AbstractContextManager[Any]:
    """Kinds of pieces put together."""
    kind_of = retention.kind_of
    return mock.patch.object(tagging, "kind_of", lambda *a, **b: change(kind_of(*a, **b)))


def _text_after_media_is_text() -> AbstractContextManager[Any]:
    def kind_of(piece: Any, *, session: bool) -> int:
        return 2 * (piece.content.identifier is not None) + session

    return mock.patch.object(tagging, "kind_of", kind_of)


def _nothing_is_continued() -> AbstractContextManager[Any]:
    add = reuse_history.ReuseHistory.add
    return mock.patch.object(
        reuse_history.ReuseHistory, "add", lambda self, key, kind, _like: add(self, key, kind)
    )


def _encoding_counts_in_part() -> AbstractContextManager[Any]:
    saved = pieces.Piece.saved

    def changed(self: Any, hidden_size: int, *, encoded: bool) -> float:
        whole, self.whole = self.whole, True
        try:
            return saved(self, hidden_size, encoded=encoded)
        finally:
            self.whole = whole

    return mock.patch.object(pieces.Piece, "saved", changed)


RULES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    **{
        f"{name} x {by:g}": partial(_scaled, owner, attribute, by)
        for name, owner, attribute, factors in _CONSTANTS
        for by in factors
    },
    "all kinds alike at first": lambda: _levels(lambda found: [1.0] * len(found)),
    "sessions higher at first": lambda: _levels(
        lambda found: [2.0 if n % 2 else level for n, level in enumerate(found)]
    ),
    "sessions are no kind": lambda: _kinds(lambda kind: kind - kind % 2),
    "text after media is text": _text_after_media_is_text,
    "no kinds": lambda: _kinds(lambda _: 2),
    "what continues a piece is new": _nothing_is_continued,
    "encoding counts for parts of items": _encoding_counts_in_part,
}
