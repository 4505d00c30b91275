"""Where one video is cut into segments. Pure arithmetic: no torch, no vLLM.

A cut depends only on the video before it (the size of the frames, the times of the grids, the
sound), never on how long the video goes on. So a clip that is extended keeps its segments.

A temporal grid is the tokens of one temporal patch, which is a few consecutive frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Times are compared in whole microseconds.
_TICKS = 1_000_000

Run = tuple[int, int]
"""Numbers of visual tokens and of the audio tokens that follow them in the prompt."""
Reduced = Callable[[int], int]
"""Returns how many tokens a reduction leaves of so many grids; never fewer for more grids."""


@dataclass(frozen=True)
class Cut:
    """One segment of a video.

    Attributes:
        grids: The segment's first temporal grid, and the grid after its last.
        audio: The segment's first audio token, and the audio token after its last.
        runs: The segment's tokens before any reduction; a single run if the video has no sound.
    """

    grids: tuple[int, int]
    audio: tuple[int, int]
    runs: tuple[Run, ...]


def cut_silent(
    num_grids: int, tokens_per_grid: int, target: int, reduced: Reduced, unit: int = 1
) -> list[Cut]:
    """Cut a video without sound.

    Args:
        num_grids: Temporal grids of the video, at least one.
        tokens_per_grid: Tokens of each grid before reduction.
        target: Most tokens of a segment after reduction; a single unit may have more, as units are
            never cut. 0: no cuts.
        reduced: Says how many tokens are left of so many consecutive grids.
        unit: Number of grids that a reduction merges; they stay in one segment.

    Returns:
        The segments in order; together they are the whole video.
    """
    per_segment = unit if target else num_grids
    while per_segment < num_grids and reduced(per_segment + unit) <= target:
        per_segment += unit
    return [
        Cut((begin, end), (0, 0), (((end - begin) * tokens_per_grid, 0),))
        for begin in range(0, num_grids, per_segment)
        for end in [min(begin + per_segment, num_grids)]
    ]


def cut_sounding(
    runs: Sequence[Run],
    tokens_per_grid: int,
    target: int,
    reduced: Reduced,
    *,
    audio_unit: int,
    audio_least: int = 1,
    unit: int = 1,
) -> list[Cut]:
    """Cut a video whose tokens interleave with those of its sound.

    Cuts lie where both a grid and a window of the audio encoder end. Every segment has at least one
    grid; sound that goes on after the last grid stays in the last grid's segment.

    Args:
        runs: ``(visual, audio)`` tokens of the whole video in prompt order, before reduction.
        tokens_per_grid: Visual tokens of a temporal grid before reduction.
        target: Most tokens of a segment after reduction; a segment has more where the video cannot
            be cut. 0: no cuts.
        reduced: Says how many visual tokens are left of so many consecutive grids.
        audio_unit: Audio tokens of one window; the audio encoder attends within windows.
        audio_least: A last piece of sound of fewer tokens than this gets no segment of its own.
        unit: Number of grids that a reduction merges; they stay in one segment.

    Returns:
        The segments in order; together they are all runs.
    """
    pieces = _windows(runs, audio_unit)
    total_visual = sum(visual for visual, _ in runs)
    total_audio = sum(audio for _, audio in runs)
    cuts: list[Cut] = []
    done = (0, 0)  # Visual and audio tokens in finished segments.
    here = (0, 0)  # Visual and audio tokens so far.
    open_runs: list[Run] = []
    # The last possible cut of the open segment: runs before the cut, tokens up to the cut.
    best: tuple[int, tuple[int, int]] | None = None

    def close(count: int, at: tuple[int, int]) -> None:
        nonlocal done, open_runs, best
        grids = done[0] // tokens_per_grid, at[0] // tokens_per_grid
        cuts.append(Cut(grids, (done[1], at[1]), tuple(open_runs[:count])))
        done, open_runs, best = at, open_runs[count:], None

    for visual, audio in pieces:
        # Sound that goes on after the last grid must not move the cuts before the last grid.
        if target and best and here[0] < total_visual:
            grids = -(-(here[0] + visual - done[0]) // tokens_per_grid)
            if reduced(grids) + here[1] + audio - done[1] > target:
                close(*best)
        open_runs.append((visual, audio))
        here = here[0] + visual, here[1] + audio
        left = total_audio - here[1]
        audible = left == 0 or (here[1] % audio_unit == 0 and left >= audio_least)
        whole = (here[0] - done[0]) % (tokens_per_grid * unit) == 0
        if audible and whole and done[0] < here[0] < total_visual:
            best = len(open_runs), here
    close(len(open_runs), here)
    return cuts


def cut_between(
    runs: Sequence[Run], tokens_per_grid: int, target: int, reduced: Reduced
) -> list[Cut]:
    """Cut a video that may be cut between any two runs, as no run depends on another.

    Args:
        runs: ``(visual, audio)`` tokens before reduction in prompt order. A run is a group of grids
            that a reduction merges, or a window of the audio encoder; a segment may have visual
            tokens only or audio tokens only.
        tokens_per_grid, target, reduced: As for `cut_sounding`.

    Returns:
        The segments in order; together they are all runs.
    """
    cuts: list[Cut] = []
    own: list[Run] = []
    begin = end = (0, 0)  # Visual and audio tokens before the open segment, and so far.
    for visual, audio in runs:
        then = end[0] + visual, end[1] + audio
        grids = (then[0] - begin[0]) // tokens_per_grid
        if target and own and reduced(grids) + then[1] - begin[1] > target:
            cuts.append(_cut(begin, end, own, tokens_per_grid))
            begin, own = end, []
        own.append((visual, audio))
        end = then
    return [*cuts, _cut(begin, end, own, tokens_per_grid)]


def unit_ends(
    seconds: Sequence[float], unit_s: float, *, audio: int = 0, audio_per_unit: int = 0
) -> list[tuple[int, int]]:
    """Where the units of a growing video end.

    Args:
        seconds: Time of each temporal grid, ascending.
        unit_s: Seconds of a unit.
        audio: Audio tokens of the sound so far.
        audio_per_unit: Audio tokens of a whole unit.

    Returns:
        Grids and audio tokens up to the end of each unit that has a grid. Sound that goes on after
        the last grid belongs to the last unit.
    """
    unit_of = [round(at * _TICKS) // round(unit_s * _TICKS) for at in seconds]
    ends = [
        (grid, min(audio, (unit + 1) * audio_per_unit))
        for grid, (unit, following) in enumerate(pairwise(unit_of), 1)
        if following != unit
    ]
    return [*ends, (len(seconds), audio)]


def cut_units(
    runs: Sequence[Run],
    tokens_per_grid: int,
    ends: Sequence[tuple[int, int]],
    inside: Callable[[Sequence[Run]], list[Cut]] | None = None,
) -> list[Cut]:
    """Cut a growing video where its units end.

    Args:
        runs: ``(visual, audio)`` tokens before reduction in prompt order; what ends at a place
            stands before what begins there.
        tokens_per_grid: Visual tokens of a temporal grid before reduction.
        ends: Grids and audio tokens up to the end of each unit, as `unit_ends` returns them.
        inside: Cuts the runs of one unit further, as if they were a video; None: no further cuts.

    Returns:
        The segments in order. Those of a unit do not depend on the units after it.
    """
    cuts: list[Cut] = []
    own: list[Run] = []
    begin = here = (0, 0)  # Visual and audio tokens before the open unit, and so far.
    closed = 0
    for visual, audio in runs:
        rest = visual, audio
        here = here[0] + visual, here[1] + audio
        while closed < len(ends):
            end = ends[closed][0] * tokens_per_grid, ends[closed][1]
            if here[0] < end[0] or here[1] < end[1]:
                break
            left = here[1] - end[1]
            own.append((rest[0], rest[1] - left))
            if inside is None:
                cuts.append(_cut(begin, end, own, tokens_per_grid))
            else:
                cuts += [_moved(cut, begin, tokens_per_grid) for cut in inside(own)]
            begin, own, rest = end, [], (0, left)
            closed += 1
        if rest != (0, 0):
            own.append(rest)
    return cuts


def _moved(cut: Cut, by: tuple[int, int], tokens_per_grid: int) -> Cut:
    """A cut of a part of a video, as one of the whole video."""
    grids, audio = by[0] // tokens_per_grid, by[1]
    return Cut(
        (cut.grids[0] + grids, cut.grids[1] + grids),
        (cut.audio[0] + audio, cut.audio[1] + audio),
        cut.runs,
    )


def _cut(
    begin: tuple[int, int], end: tuple[int, int], runs: Sequence[Run], tokens_per_grid: int
) -> Cut:
    grids = begin[0] // tokens_per_grid, end[0] // tokens_per_grid
    return Cut(grids, (begin[1], end[1]), tuple(runs))


def _windows(runs: Sequence[Run], audio_unit: int) -> list[Run]:
    """Split runs where a window of the audio encoder ends."""
    pieces: list[Run] = []
    heard = 0
    for visual, audio in runs:
        while audio > (left := audio_unit - heard % audio_unit):
            pieces.append((visual, left))
            heard += left
            visual, audio = 0, audio - left
        pieces.append((visual, audio))
        heard += audio
    return pieces


def reduced_runs(
    runs: Sequence[Run], tokens_per_grid: int, left: Sequence[int], temporal: int
) -> list[Run]:
    """Runs of a segment after token reduction.

    The tokens left of a group of merged grids stand where the first token of the group stood.

    Args:
        runs: The segment's runs before reduction.
        tokens_per_grid: Visual tokens of a grid before reduction.
        left: Visual tokens that the reduction leaves of each group of merged grids.
        temporal: Grids per group.

    Returns:
        As many runs as before, some perhaps without visual tokens.
    """
    reduced: list[Run] = []
    seen = groups = 0
    for visual, audio in runs:
        seen += visual
        # Groups whose first token is among the tokens seen.
        begun = min(len(left), -(-seen // (tokens_per_grid * temporal)))
        reduced.append((sum(left[groups:begun]), audio))
        groups = begun
    return reduced
