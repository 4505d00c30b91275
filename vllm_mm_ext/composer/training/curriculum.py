"""From short clips with few frames to long ones with many: what each step of training sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.composer.training.note_samples import (
    WINDOW_S,
    notes_sample,
    window_sample,
    with_note,
)
from vllm_mm_ext.composer.training.samples import Sample, generated_sample

Kind = Literal["clips", "windows", "notes"]

# Tokens of a batch, about: many short clips or few long ones.
_BATCH_TOKENS = 2600
_MOST_CLIPS, _SEEDS_PER_STEP = 8, 64
_QUESTIONS = 12
_TOKENS_PER_QUESTION = 13
# Shares of batches whose clips have no sound track, and whose questions form a conversation.
_SILENT, _CONVERSATIONS = 0.08, 0.2
# What steps are about, once clips have full length: clips, windows of recordings, lines of notes.
_KINDS: tuple[Kind, ...] = ("clips", "windows", "notes")
_KIND_SHARES = (0.24, 0.26, 0.5)
# Questions about notes and windows, more of which are asked of a clip as well; tokens of the notes
# of a window, of a question about them with its answer, and of a note about a clip.
_NOTE_QUESTIONS, _WINDOW_QUESTIONS, _CLIP_NOTES = 16, 5, 4
_TOKENS_PER_WINDOW, _TOKENS_PER_SELECTION, _TOKENS_PER_NOTE = 40, 32, 60
# Lines of notes grow from few to many: copying is learnt from short texts first.
_FEW_WINDOWS, _MOST_WINDOWS, _WINDOW_STEPS = 2, 7, 1000


@dataclass(frozen=True)
class Plan:
    """What all samples of a batch have in common.

    Attributes:
        kind: What the samples are.
        clips: How many.
        duration, frames: Of a clip; of a window its frames.
        windows: Whose notes text is made of.
        sound: Clips have a sound track.
        independent: See `Sample`.
        pool, temporal: The reduction.
    """

    kind: Kind
    clips: int
    duration: int
    frames: int
    windows: int
    sound: bool
    independent: bool
    pool: int
    temporal: int


def plan_step(config: ComposerConfig, seed: int, step: int, ramp: int) -> Plan:
    """The plan of a step; follows from the seed and the step alone.

    Args:
        config: Declares the reductions, one of which (or none) is drawn.
        seed: Of the training.
        step: From 0.
        ramp: Steps over which clips grow to full length.
    """
    rng = np.random.default_rng((seed, 2, step))
    done = min(1.0, step / max(1, ramp))
    longest = 8 + round(12 * min(1.0, 2 * done))
    duration, most = int(rng.integers(4, longest + 1)), 10 + round(54 * done)
    if done > 0.5 and rng.random() < 0.4 * done:
        duration = int(rng.integers(21, 31))
    frames = min(int(rng.integers(8, most + 1)), 10 * duration)
    pool, temporal = draw_reduction(config, rng)
    sound = bool(rng.random() >= _SILENT) and config.hears
    kind = _KINDS[int(rng.choice(len(_KINDS), p=_KIND_SHARES))] if done == 1 else "clips"
    independent = bool(rng.random() >= _CONVERSATIONS) or kind != "clips"
    grown = min(1.0, max(0, step - ramp) / _WINDOW_STEPS)
    longest_text = _FEW_WINDOWS + round((_MOST_WINDOWS - _FEW_WINDOWS) * grown)
    # Short ones are more, as they are cheap.
    windows = 1 + int(longest_text * rng.random() ** 1.7)
    if kind == "notes":
        tokens = windows * _TOKENS_PER_WINDOW + _NOTE_QUESTIONS * _TOKENS_PER_SELECTION
    else:
        if kind == "windows":
            duration = WINDOW_S
            # A first look, or a note.
            frames = int(rng.integers(8, 17) if rng.random() < 0.3 else rng.integers(16, 65))
        tokens = -(-frames // temporal) * (config.frame_tokens(pool) + 1)
        tokens += sum(config.audio_tokens(duration * 16_000)) if sound else 0
        turns = _WINDOW_QUESTIONS if kind == "windows" else _QUESTIONS
        tokens += turns * _TOKENS_PER_QUESTION + _TOKENS_PER_NOTE
    return Plan(
        kind=kind,
        clips=int(np.clip(_BATCH_TOKENS // tokens, 2, _MOST_CLIPS)),
        duration=duration,
        frames=frames,
        windows=windows,
        sound=sound,
        independent=independent,
        pool=pool,
        temporal=temporal,
    )


def draw_reduction(config: ComposerConfig, rng: np.random.Generator) -> tuple[int, int]:
    """None or a declared one; none twice as often: what is asked of most tokens is learnt last."""
    pairs = [(1, 1), *(one[:2] for one in config.declared)]
    weights = np.array([2.0 if pair == (1, 1) else 1.0 for pair in pairs])
    return pairs[int(rng.choice(len(pairs), p=weights / weights.sum()))]


def plan_samples(
    config: ComposerConfig, plan: Plan, seed: int, step: int, rank: int = 0
) -> list[Sample]:
    """The samples of a step of generated training.

    Args:
        config: Of the model.
        plan: Of the step.
        seed: Of the training.
        step: From 0.
        rank: Of the process in a data-parallel training; each sees other clips.
    """
    first = (seed % 1000) * 1_000_000_000 + step * _SEEDS_PER_STEP + rank * _MOST_CLIPS
    size = int(config.vision_config.image_size)
    return [_sample(plan, first + index, size) for index in range(plan.clips)]


def _sample(plan: Plan, seed: int, size: int) -> Sample:
    if plan.kind == "notes":
        return notes_sample(seed, plan.windows, _NOTE_QUESTIONS, size)
    if plan.kind == "windows":
        return window_sample(seed, plan.frames, _WINDOW_QUESTIONS, size, sound=plan.sound)
    sample = generated_sample(
        seed,
        plan.duration,
        plan.frames,
        _QUESTIONS if plan.independent else 8,
        size,
        sound=plan.sound,
        independent=plan.independent,
    )
    if not plan.independent:
        return sample
    return with_note(sample, np.random.default_rng((seed, 17)), _CLIP_NOTES)
