"""Sound that detectors of speech take for speech, made by code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Centres in Hz, widths in Hz and weights of the three formants of some vowels.
_VOWELS = np.array(
    [
        (730, 1090, 2440),
        (270, 2290, 3010),
        (530, 1840, 2480),
        (570, 840, 2410),
        (300, 870, 2240),
        (660, 1720, 2410),
    ],
    float,
)
_FORMANTS = ((70.0, 1.0), (100.0, 0.6), (150.0, 0.35))
_PITCH_HZ = (95.0, 150.0)
_SYLLABLE_S = (0.12, 0.25)
_HARMONICS = 31
_PEAK = 0.5


def made_speech(seconds: float, seed: int, rate: int) -> npt.NDArray[np.float32]:
    """Babble of a low voice: vowels that flow into each other, a swell a syllable.

    Silero's detector gives nearly every window of it more than 0.3, most of them 0.9.

    Args:
        seconds: Its length.
        seed: Other seeds say something else.
        rate: Samples per second.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    count = int(seconds / _SYLLABLE_S[0]) + 2
    starts = np.concatenate([[0.0], np.cumsum(rng.uniform(*_SYLLABLE_S, count))])
    vowels = _VOWELS[rng.integers(len(_VOWELS), size=len(starts))]
    centres = [np.interp(time, starts, vowels[:, formant]) for formant in range(3)]
    pitch = np.interp(time, starts, rng.uniform(*_PITCH_HZ, len(starts)))
    middles = (starts[1:] + starts[:-1]) / 2
    swell = np.full(len(starts) + len(middles), 0.12)
    swell[1::2] = rng.uniform(0.6, 1.0, len(middles))
    loudness = np.interp(time, np.sort(np.concatenate([starts, middles])), swell)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    out = 0.02 * rng.standard_normal(len(time))
    for harmonic in range(1, _HARMONICS + 1):
        hz = harmonic * pitch
        level = sum(
            weight / (1 + ((hz - centre) / width) ** 2)
            for centre, (width, weight) in zip(centres, _FORMANTS, strict=True)
        )
        out += level * np.sin(harmonic * phase) * (hz < rate / 2) * harmonic**-0.3
    out *= loudness
    spoken: npt.NDArray[np.float32] = (_PEAK * out / np.abs(out).max()).astype(np.float32)
    return spoken
