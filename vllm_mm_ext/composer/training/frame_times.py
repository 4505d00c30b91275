"""Which frames of a generated clip training sees: even ones, or as a sampler by content picks."""

from __future__ import annotations

import numpy as np

from vllm_mm_ext.composer.training.clips import Clip

# Frames of a clip that could be picked: those of a 20 fps file.
CLIP_FPS = 20
_EVEN_SHARE = 0.35
# With so many frames a sampler gives a flash all that it has.
_MANY = 24


def pick_seconds(clip: Clip, frames: int, rng: np.random.Generator) -> list[float]:
    """Ascending times of exactly so many frames.

    About a third of all picks is even, with a random offset. The others hold evenly spread frames
    with jitter, nearly always some of each flash, some right after a cut, and random ones.

    Args:
        clip: At least ``frames`` long at 20 fps.
        frames: How many.
        rng: Decides.
    """
    total = clip.duration * CLIP_FPS
    if rng.random() < _EVEN_SHARE:
        offset = float(rng.choice((0.0, rng.uniform(0, 1))))
        ticks = np.floor((np.arange(frames) + offset) * total / frames).astype(int)
        return [round(int(tick) / CLIP_FPS, 3) for tick in ticks]
    spread = max(4, int(frames * rng.uniform(0.4, 0.75)))
    jitter = rng.uniform(0, rng.uniform(0.1, 0.9), spread)
    picked = {int((k + jitter[k]) * total / spread) for k in range(spread)}
    kept = set()
    for flash in clip.flashes:
        if rng.random() < 0.97:
            first, last = int(flash.start * CLIP_FPS) + 1, int((flash.end - 0.02) * CLIP_FPS)
            count = min(last - first + 1, int(rng.integers(1, 4 if frames < _MANY else 9)))
            kept |= {int(k) for k in rng.choice(np.arange(first, last + 1), count, replace=False)}
    for scene in clip.scenes[1:]:
        if rng.random() < 0.5:
            kept.add(int(scene.start * CLIP_FPS) + 2)
    kept = {tick for tick in kept if tick < total}
    others = [int(k) for k in rng.permutation(sorted(picked - kept))]
    chosen = kept | set(others[: max(0, frames - len(kept))])
    for tick in rng.permutation(total):
        if len(chosen) >= frames:
            break
        chosen.add(int(tick))
    surplus = len(chosen) - frames
    if surplus > 0:
        chosen -= {int(k) for k in rng.permutation(sorted(chosen))[:surplus]}
    return [tick / CLIP_FPS for tick in sorted(chosen)]
