"""Which of some entries a model's reply copies.

Only entries that the model was given count, so it cannot invent one. The reply is matched loosely:
models round times, drop marks and shorten texts.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mm_ext.long_video.notes import Entry, marked_parts, plain, says_something

# An entry whose text shares at least this part of the words may be up to so many seconds off.
_SHARED_WORDS = 0.5
_NEAR_S = 2.0


def selected(reply: str, group: Sequence[Entry]) -> list[Entry]:
    """The entries of a group that a reply copies, in the order of the group.

    A reply that copies none of them but says something is kept as it is, as entries about the time
    of the whole group: such a model summarises where it should copy.
    """
    parts = _parts(reply)
    left = {number: plain(entry.text) for number, entry in enumerate(group)}
    found = []
    for time, text in parts:
        if (number := _match(time, plain(text), group, left)) is not None:
            del left[number]
            found.append(number)
    if found or not parts:
        return [group[number] for number in sorted(found)]
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


def _match(
    time: float | None, text: str, group: Sequence[Entry], left: dict[int, str]
) -> int | None:
    """The entry that a part of a reply copies: the same words, or some of them at its time."""
    words = set(text.split())

    def off(number: int) -> float:
        return 0.0 if time is None else abs(group[number].time - time)

    same = [number for number in left if left[number] == text]
    if same:
        return min(same, key=off)
    if time is None:
        return None
    near = [
        number
        for number in left
        if off(number) <= _NEAR_S and _alike(words, set(left[number].split()))
    ]
    return min(near, key=off) if near else None


def _alike(one: set[str], other: set[str]) -> bool:
    # A mark without a text stands for whatever begins then.
    return not one or len(one & other) >= _SHARED_WORDS * min(len(one), len(other))
