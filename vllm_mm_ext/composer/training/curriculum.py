"""From short clips with few frames to long ones with many: what each step of training sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.composer.training.samples import Sample, generated_sample

# Tokens of a batch, about: many short clips or few long ones.
_BATCH_TOKENS = 2600
_MOST_CLIPS, _SEEDS_PER_STEP = 8, 64
_QUESTIONS = 12
_TOKENS_PER_QUESTION = 13
# Shares of batches whose clips have no sound track, and whose questions form a conversation.
_SILENT, _CONVERSATIONS = 0.08, 0.2


@dataclass(frozen=True)
class Plan:
    """What all samples of a batch have in common."""

    clips: int
    duration: int
    frames: int
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
    sound = bool(rng.random() >= _SILENT)
    tokens = -(-frames // temporal) * (config.frame_tokens(pool) + 1)
    tokens += sum(config.audio_tokens(duration * 16_000)) if sound else 0
    tokens += _QUESTIONS * _TOKENS_PER_QUESTION
    return Plan(
        clips=int(np.clip(_BATCH_TOKENS // tokens, 2, _MOST_CLIPS)),
        duration=duration,
        frames=frames,
        sound=sound,
        independent=bool(rng.random() >= _CONVERSATIONS),
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
    return [
        generated_sample(
            first + index,
            plan.duration,
            plan.frames,
            _QUESTIONS if plan.independent else 8,
            size,
            sound=plan.sound,
            independent=plan.independent,
        )
        for index in range(plan.clips)
    ]
