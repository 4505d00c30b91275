"""Which of some entries a model's reply copies.

Only entries that the model was given count, so it cannot invent one. The reply is matched loosely:
models round times, drop marks and shorten texts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence

from vllm_mm_ext.long_video.notes import Entry, marked_parts, plain, says_something

# An entry whose text shares at least this part of the words may be up to so many seconds off.
_SHARED_WORDS = 0.5
_NEAR_S = 2.0


def selected(reply: str, group: Sequence[Entry]) -> list[Entry]:
    """The entries of a group that a reply copies, in the order of the group.

    A reply that copies none of them but says something is kept as it is, as entries about the time
    of the whole group: such a model summarises where it should copy.

    Args:
        reply: What the model wrote.
        group: What it was given, in order of time.
    """
    parts = _parts(reply)
    choice = _Choice(group)
    for time, text in parts:
        choice.add(time, plain(text))
    if choice.taken or not parts:
        return [group[number] for number in sorted(choice.taken)]
    first, last = group[0], group[-1]
    until = last.until if last.until is not None else last.time
    return [Entry(first.video, first.time, text, first.window, until) for _, text in parts]


def _parts(reply: str) -> list[tuple[float | None, str]]:
    parts = marked_parts(reply)
    if all(time is None for time, _ in parts):
        # Without marks, what stands between the separators of entries.
        parts = [(None, text) for _, line in parts for text in line.split(";")]
    return [
        (time, text.strip()) for time, text in parts if time is not None or says_something(text)
    ]


class _Choice:
    """Numbers of the entries that parts of a reply copy, each part another one."""

    def __init__(self, group: Sequence[Entry]) -> None:
        self.taken: set[int] = set()
        self._times = [entry.time for entry in group]
        self._texts = [plain(entry.text) for entry in group]
        self._numbers: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(self._texts):
            self._numbers[text].append(number)

    def add(self, time: float | None, text: str) -> None:
        """Take the entry that a part copies: the same words, or some of them at its time."""
        same = [number for number in self._numbers.get(text, ()) if number not in self.taken]
        if found := same or self._near(time, set(text.split())):
            self.taken.add(found[0] if time is None else min(found, key=self._off(time)))

    def _near(self, time: float | None, words: set[str]) -> list[int]:
        if time is None:
            return []
        low = bisect_left(self._times, time - _NEAR_S)
        high = bisect_right(self._times, time + _NEAR_S)
        return [
            number
            for number in range(low, high)
            if number not in self.taken and _alike(words, set(self._texts[number].split()))
        ]

    def _off(self, time: float) -> Callable[[int], float]:
        return lambda number: abs(self._times[number] - time)


def _alike(one: set[str], other: set[str]) -> bool:
    # A mark without a text stands for whatever begins then.
    return not one or len(one & other) >= _SHARED_WORDS * min(len(one), len(other))
