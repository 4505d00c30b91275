"""M-RoPE positions of prompts in which a video's tokens interleave with those of its sound.

Positions are read off the prompt itself: which token is visual and which is audio is already
decided there, so positions and tokens cannot disagree. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Item:
    """A media item in the prompt.

    Attributes:
        offset: First token of the item.
        length: Tokens of the item.
        visual: int64 ``[3, visual tokens]`` positions relative to the item's start; None for
            audio.
        has_track: The tokens are those of a video and of its sound, and stand between a start and
            an end token of audio.
    """

    offset: int
    length: int
    visual: Positions | None = None
    has_track: bool = False


@dataclass(frozen=True)
class Markers:
    """Token ids that tell a prompt's parts, and how a family counts those around sound in video.

    Attributes:
        video, audio: Placeholder tokens.
        vision_start, vision_end: Tokens around a video.
        shared: The start (end) tokens of audio and of vision around a video with sound have one
            position between them (Qwen2.5-Omni) instead of one each (Qwen3-Omni).
    """

    video: int
    audio: int
    vision_start: int
    vision_end: int
    shared: bool


def vision_positions(temporal: Positions, height: int, width: int) -> Positions:
    """Positions ``[3, grids * height * width]`` of visual tokens relative to their start."""
    grid = np.empty((3, len(temporal), height, width), np.int64)
    grid[0] = temporal[:, None, None]
    grid[1] = np.arange(height)[:, None]
    grid[2] = np.arange(width)
    return grid.reshape(3, -1)


def positions_of(
    tokens: Sequence[int], items: Sequence[Item], markers: Markers | None
) -> Positions:
    """M-RoPE positions of a prompt.

    Equal to transformers' ``get_rope_index`` of the two omni families where that is defined (sound
    in all videos of a request or in none, evenly spaced frames). Like there, what follows an item
    begins one past the largest position of the item's last run of one modality.

    Args:
        tokens: Token ids of the prompt.
        items: Media items in the prompt, by ascending offset.
        markers: Token ids; None where no item has a track.

    Returns:
        int64 ``[3, len(tokens)]``.
    """
    ids = np.asarray(tokens)
    out = np.empty((3, len(ids)), dtype=np.int64)
    done = 0
    following = 0
    for item in items:
        # The start token of audio before a video with sound belongs to it.
        begin = item.offset - item.has_track
        done, following = _text(out, done, begin, following)
        end = item.offset + item.length
        if item.has_track:
            assert markers is not None
            following, end = _with_track(out, ids, item, following, markers)
        elif item.visual is None:
            _, following = _text(out, done, end, following)
        else:
            block = item.visual + following
            out[:, item.offset : end] = block
            following = int(block.max()) + 1
        done = end
    _text(out, done, len(ids), following)
    return out


def _text(out: Positions, begin: int, end: int, following: int) -> tuple[int, int]:
    out[:, begin:end] = np.arange(following, following + end - begin)
    return end, following + end - begin


def _with_track(
    out: Positions, ids: npt.NDArray[np.int64], item: Item, following: int, markers: Markers
) -> tuple[int, int]:
    """Fill in a video with sound; return the next position and the first token not filled in."""
    assert item.visual is not None
    begin, end = item.offset - 1, item.offset + item.length + 1
    start_shared = markers.shared and begin > 0 and ids[begin - 1] == markers.vision_start
    start = following - 1 if start_shared else following
    out[:, begin] = start
    inside = slice(begin + 1, end - 1)
    is_video = ids[inside] == markers.video
    is_audio = ids[inside] == markers.audio
    block = out[:, inside]
    block[:, is_video] = start + 1 + item.visual
    block[:, is_audio] = start + 1 + np.arange(int(is_audio.sum()))
    changes = np.flatnonzero(is_video[1:] != is_video[:-1])
    last_run = int(changes[-1]) + 1 if len(changes) else 0
    after = int(block[:, last_run:].max()) + 1
    out[:, end - 1] = after
    if markers.shared and end < len(ids) and ids[end] == markers.vision_end:
        out[:, end] = after
        end += 1
    return after + 1, end
