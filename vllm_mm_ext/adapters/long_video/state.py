"""What an API server keeps between requests about long videos, and how many it answers at once."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from vllm_mm_ext.config.long_video_settings import LongVideoSettings
from vllm_mm_ext.errors import BusyError
from vllm_mm_ext.long_video.note_store import NoteStore
from vllm_mm_ext.media.cache import ByteBudgetCache

_MIB = 1 << 20
# Windows whose digest is known; an entry takes some hundred bytes.
_MAX_WINDOWS = 1 << 16


class Shown(NamedTuple):
    """What a model is shown of a window.

    Attributes:
        digest: Of the frames, their times and the sound.
        level: The load tier at which the window was planned so.
        made: When, in seconds of the monotonic clock.
    """

    digest: str
    level: int
    made: float


class LongVideoState:
    """Kept by the runtime of an engine.

    Args:
        settings: The section ``long_video``.

    Attributes:
        notes: Replies about windows.
        windows: For a window of a file, and how it is looked at, what it shows.
    """

    def __init__(self, settings: LongVideoSettings) -> None:
        self.notes = NoteStore(settings.notes_mb * _MIB, settings.notes_ttl_s)
        self.windows: ByteBudgetCache[str, Shown] = ByteBudgetCache(_MAX_WINDOWS, lambda _: 1)
        self._max_requests = settings.max_requests
        self._requests = 0

    def enter(self) -> Place:
        """A place among the requests that are answered at once.

        Raises:
            BusyError: There is none.
        """
        if self._requests >= self._max_requests:
            raise BusyError(
                f"This server answers {self._max_requests} requests about long videos at once "
                "(mm_ext.long_video.max_requests), and all are under way. Send it again later."
            )
        self._requests += 1
        return Place(self)

    def leave(self) -> None:
        """Called when a place is given up."""
        self._requests -= 1

    def clear(self) -> None:
        """Forget all windows and their notes: neither tells of which file it is."""
        self.notes.clear()
        self.windows.clear()

    def stats(self) -> dict[str, int]:
        """Requests under way, and what is kept."""
        return {
            "requests": self._requests,
            "notes": len(self.notes),
            "note_bytes": self.notes.num_bytes,
            "known_windows": self.windows.stats().entries,
        }


class Place:
    """A request's place. It ends with ``leave``, or when nobody refers to it any more.

    A stream whose client has left may never be begun, so nothing in it can be relied on to run.

    Args:
        state: Whose place it is.
    """

    def __init__(self, state: LongVideoState) -> None:
        self._leave = weakref.finalize(self, state.leave)
        self._leave.atexit = False

    def leave(self) -> None:
        """Give the place up; does nothing the second time."""
        self._leave()
