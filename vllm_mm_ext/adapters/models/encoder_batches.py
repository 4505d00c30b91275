"""Encoder calls of bounded size. Pure torch.

Vision encoders attend within one temporal grid, so a video may be cut between any two of them; what
bounds the transient memory of a call is how many patches it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Grid = list[int]
"""Temporal grids, and height and width of each in patches."""


def cut_batches(grids: Sequence[Grid], max_patches: int) -> list[list[tuple[int, Grid]]]:
    """Cut videos into encoder calls, in order, each as full as the bound allows.

    Args:
        grids: ``[t, h, w]`` of each video.
        max_patches: Patches of a call; one temporal grid is never cut. 0: no bound.

    Returns:
        Of each call, the pieces it holds: which video, and the ``[t, h, w]`` of the piece.
    """
    batches: list[list[tuple[int, Grid]]] = [[]]
    room = max_patches
    for video, (grids_left, height, width) in enumerate(grids):
        if not max_patches:
            batches[0].append((video, [grids_left, height, width]))
            continue
        while grids_left:
            fitting = room // (height * width)
            if fitting < 1 and batches[-1]:
                batches.append([])
                room = max_patches
                continue
            taken = min(grids_left, max(1, fitting))
            batches[-1].append((video, [taken, height, width]))
            room -= taken * height * width
            grids_left -= taken
    return batches


def encode_in_batches(
    encode: Callable[[torch.Tensor, list[Grid]], Sequence[torch.Tensor]],
    pixels: torch.Tensor,
    grids: Sequence[Grid],
    max_patches: int,
) -> list[torch.Tensor]:
    """Encode videos (or images, with one temporal grid each) in calls of bounded size.

    Args:
        encode: Encodes the patches ``[sum of t * h * w, values]`` of some videos, given the
            ``[t, h, w]`` of each; answers with one tensor ``[tokens, channels]`` for each.
        pixels: Patches of all videos, one after the other.
        grids: ``[t, h, w]`` of each video in patches.
        max_patches: As for ``cut_batches``.

    Returns:
        Tokens of each video.
    """
    pieces: list[list[torch.Tensor]] = [[] for _ in grids]
    done = 0
    for batch in cut_batches(grids, max_patches):
        videos = [video for video, _ in batch]
        shapes = [shape for _, shape in batch]
        patches = sum(t * h * w for t, h, w in shapes)
        outputs = encode(pixels[done : done + patches], shapes)
        done += patches
        for video, output in zip(videos, outputs, strict=True):
            pieces[video].append(output)
    return [own[0] if len(own) == 1 else torch.cat(own) for own in pieces]


def encode_frames_in_batches(
    encode: Callable[[torch.Tensor], torch.Tensor], frames: torch.Tensor, max_frames: int
) -> torch.Tensor:
    """The same for an encoder that sees every frame by itself.

    Args:
        encode: ``[frames, ...]`` to ``[frames, tokens, channels]``.
        frames: Frames of any number of videos.
        max_frames: Frames of a call, at least 1. 0: no bound.

    Returns:
        ``[frames, tokens, channels]``.
    """
    if not max_frames or len(frames) <= max_frames:
        return encode(frames)
    return torch.cat([encode(chunk) for chunk in frames.split(max_frames)])
