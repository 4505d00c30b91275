"""Units, stretches and conversations that tests of live sessions share."""

from __future__ import annotations

import numpy as np

from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.prompt import Frame, Message, Part, Prompt, Stretch, Unit
from vllm_mm_ext.media.sizing import target_size


def unit(
    traits: FamilyTraits, number: int, *, sound: bool, frames: int, share: float = 1.0
) -> Unit:
    """A unit whose sound and frames tell it from others; later ones are louder."""
    rng = np.random.default_rng(number)
    begin, length = number * traits.unit_s, share * traits.unit_s
    count = round(length * traits.audio_rate) if sound else 0
    samples = (0.02 * (number + 1) * rng.standard_normal(count)).astype(np.float32)
    height, width = target_size(traits.size_rule, width=160, height=120, num_frames=32)
    shown = tuple(
        Frame(
            rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
            begin + length * at / frames,
        )
        for at in range(frames)
    )
    return Unit(samples, shown)


def stretch_units(traits: FamilyTraits, *, sound: bool, frames: int, whole: int = 5) -> list[Unit]:
    """Some whole units, and a short one."""
    shares = [1.0] * whole + [0.3]
    return [
        unit(traits, at, sound=sound, frames=frames, share=share) for at, share in enumerate(shares)
    ]


def kinds_of(traits: FamilyTraits) -> list[tuple[bool, int]]:
    """Sound and frames, sound alone, frames alone: whether there is sound, frames of a unit."""
    return [(True, 2), (True, 0), (False, 2)] if traits.hears else [(False, 2), (False, 4)]


def conversation(
    history: list[Message], units: list[Unit], name: str, *more: Part, open: bool
) -> Prompt:
    """The conversation with a user's message of some units and other parts."""
    message = Message("user", (Stretch(name, tuple(units)), *more))
    return Prompt((*history, message), open=open)
