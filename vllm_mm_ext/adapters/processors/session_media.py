"""Media of a live session: its own bounds hold for them, not the limit on a request's items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class SessionMedia(dict[str, Any]):
    """vLLM's ``multi_modal_data`` of a live session's prompt."""


class SessionInfo:
    """Mixin in front of a family's processing info.

    ``--limit-mm-per-prompt`` is about what one client may send in a request: its numbers are small.
    A session is one prompt that has every unit, turn and picture of its time. Its bounds are its
    own: tokens, bytes and time (``mm_ext.live``).
    """

    def parse_mm_data(self, mm_data: Mapping[str, Any], *, validate: bool = True) -> Any:
        """vLLM's, without counting the items of a session."""
        counted = validate and not isinstance(mm_data, SessionMedia)
        return super().parse_mm_data(mm_data, validate=counted)  # type: ignore[misc]
