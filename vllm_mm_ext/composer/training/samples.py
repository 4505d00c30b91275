"""One example of training: what is seen and heard of a clip, and what is asked about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vllm_mm_ext.composer.configuration import SAMPLE_RATE
from vllm_mm_ext.composer.training.augment import augmented_frames, augmented_sound
from vllm_mm_ext.composer.training.clips import Clip, draw_clip
from vllm_mm_ext.composer.training.frame_times import pick_seconds
from vllm_mm_ext.composer.training.questions import Question, questions
from vllm_mm_ext.composer.training.render import Frames, Samples, render_frames, render_sound

# Seeds from here on are never trained on.
HELD_OUT = 1 << 40

# How often a task is asked, compared with the others: those that are learned last, most.
_WEIGHTS = {
    "colour": 0.4,
    "shape": 0.6,
    "pitch": 0.5,
    "glide": 0.5,
    "tone_count": 3.0,
    "motion": 1.5,
    "flash_count": 3.0,
    "flash_time": 1.5,
    "flash_colour": 2.0,
    "order": 2.0,
    "before": 1.5,
    "on_screen": 2.0,
}


@dataclass(frozen=True, eq=False)
class Sample:
    """A clip, or text, as the model gets it, with a conversation about it.

    Attributes:
        frames: uint8 ``[n, size, size, 3]``; none where there is text instead.
        seconds: Time of each frame.
        sound: float32 mono at 16 kHz; None without a sound track.
        turns: Questions with answers, in order.
        independent: Each question is asked as the first one; they do not see each other.
        clip: What was generated; None for a file, a window and text.
        text: What is asked about instead of a clip, with the newline after it.
    """

    frames: Frames
    seconds: list[float]
    sound: Samples | None
    turns: list[Question]
    independent: bool
    clip: Clip | None = None
    text: str = ""


def generated_sample(
    seed: int,
    duration: int,
    frames: int,
    turns: int,
    size: int,
    *,
    sound: bool = True,
    independent: bool = True,
    augment: bool = True,
    decided: bool = True,
) -> Sample:
    """The sample of a seed.

    Args:
        seed: Decides the clip, its frames and its questions.
        duration: Seconds of the clip.
        frames: How many frames are seen.
        turns: Questions at most.
        size: Width and height of the frames.
        sound: The clip has a sound track.
        independent: See `Sample`.
        augment: As a codec might leave it.
        decided: Only questions that the frames seen decide; otherwise all.
    """
    clip = draw_clip(seed, duration, sound)
    rng = np.random.default_rng((seed % (1 << 63), duration, frames, turns))
    seconds = pick_seconds(clip, frames, rng)
    asked = balanced(questions(clip, rng, seconds if decided else None), turns, rng)
    return Sample(
        frames=seen_frames(clip, seconds, size, rng if augment else None),
        seconds=seconds,
        sound=heard_sound(clip, rng if augment else None),
        turns=asked,
        independent=independent,
        clip=clip,
    )


def balanced(
    found: list[Question],
    turns: int,
    rng: np.random.Generator,
    weights: Mapping[str, float] = _WEIGHTS,
) -> list[Question]:
    """So many of the questions, drawn so that tasks come up as often as their weights say.

    Args:
        found: To draw from.
        turns: How many at most.
        rng: Decides.
        weights: Of tasks; 1 where nothing is said.
    """
    if len(found) <= turns:
        return found
    counts = Counter(question.task for question in found)
    shares = np.array([weights.get(one.task, 1.0) / counts[one.task] for one in found])
    drawn = rng.choice(len(found), turns, replace=False, p=shares / shares.sum())
    return [found[int(index)] for index in drawn]


def seen_frames(
    clip: Clip, seconds: list[float], size: int, rng: np.random.Generator | None
) -> Frames:
    """Frames of a clip, as a codec might leave them if ``rng`` is given."""
    frames = render_frames(clip, seconds, size)
    return frames if rng is None else augmented_frames(frames, rng)


def heard_sound(clip: Clip, rng: np.random.Generator | None) -> Samples | None:
    """Sound of a clip at 16 kHz, disturbed if ``rng`` is given; None without a sound track."""
    if not clip.has_sound:
        return None
    samples = render_sound(clip, 0, clip.duration, SAMPLE_RATE)
    return samples if rng is None else augmented_sound(samples, rng)
