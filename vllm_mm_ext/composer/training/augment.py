"""What codecs, scalers and microphones do to pictures and sound, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.composer.training.render import Frames, Samples


def augmented_frames(frames: Frames, rng: np.random.Generator) -> Frames:
    """The frames of one clip as a lossy encoder and another scaler might leave them.

    Soft edges, soft colours (chroma has half the resolution in H.264), noise, and slightly other
    brightness, contrast and tint; the same for all frames but the noise.

    Args:
        frames: uint8 ``[n, size, size, 3]``, size even.
        rng: Decides how much of each; a quarter of all clips stays as it is.
    """
    if rng.random() < 0.25:
        return frames
    out = frames.astype(np.float32)
    if rng.random() < 0.6:
        out = _blurred(out, float(rng.uniform(0.0, 0.3)))
    if rng.random() < 0.6:
        # Not ``mean``: numpy is slow along an axis of three.
        luma = (out[..., :1] + out[..., 1:2] + out[..., 2:]) / 3
        chroma = out - luma
        small = chroma.reshape(len(out), out.shape[1] // 2, 2, out.shape[2] // 2, 2, 3)
        chroma = small.mean(axis=(2, 4)).repeat(2, axis=1).repeat(2, axis=2)
        out = luma + chroma
    gain = rng.uniform(0.92, 1.06, 3) * rng.uniform(0.95, 1.04)
    out = out * gain.astype(np.float32) + np.float32(rng.uniform(-8, 8))
    sigma = float(rng.choice((0.0, rng.uniform(0.5, 5))))
    if sigma:
        out += rng.standard_normal(out.shape, dtype=np.float32) * np.float32(sigma)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def _blurred(x: npt.NDArray[np.float32], share: float) -> npt.NDArray[np.float32]:
    """Each pixel mixed with its neighbours by ``share``, vertically and horizontally."""
    for axis in (1, 2):
        x = (1 - share) * x + share / 2 * (np.roll(x, 1, axis) + np.roll(x, -1, axis))
    return x.astype(np.float32)


def augmented_sound(samples: Samples, rng: np.random.Generator) -> Samples:
    """The sound of one clip louder or softer, with the noise floor of an encoder."""
    floor = 10 ** rng.uniform(-5, -2.3) if rng.random() < 0.7 else 0.0
    out = samples * np.float32(rng.uniform(0.4, 1.2))
    if floor:
        out += rng.standard_normal(len(out), dtype=np.float32) * np.float32(floor)
    return np.clip(out, -1, 1).astype(np.float32)
