"""Waveforms for the model: resampling and log-mel spectrograms.

The functions import torch themselves, so that importing this module is cheap. Decode workers do not
use this module.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.audio.conversion import convert_rate

MODEL_RATE = 16_000
N_FFT = 400
HOP = 160
WINDOW_S = 30
# Most entries that torchaudio's filter bank may have. It has one row per output phase, so its size
# follows from the reduced ratio of the rates: 0.07 million entries from 44100 to 16000 Hz, and 706
# million from 44101 to 16000 Hz.
_MAX_KERNEL = 4_000_000

Samples = npt.NDArray[np.float32]
Normalization = Literal["whisper", "mean_variance"]

# `resample` changes torch's number of threads, which is one for the whole process, and restores it.
_threads_lock = threading.Lock()


def resample(waveform: Samples, rate: int, target: int = MODEL_RATE) -> Samples:
    """Resample a waveform by windowed-sinc interpolation.

    The result equals that of vLLM's own resampler, sample for sample. The exception are rates with
    hardly a common divisor, for which that method would take gigabytes: FFmpeg resamples those.

    Args:
        waveform: float32 mono ``[samples]``.
        rate: Sampling rate of the waveform in Hz.
        target: Sampling rate of the result in Hz.

    Returns:
        float32 ``[ceil(samples * target / rate)]``; the input itself when the rates are equal.
    """
    if rate == target:
        return waveform
    divisor = math.gcd(rate, target)
    if (rate // divisor) * (target // divisor) > _MAX_KERNEL:
        return convert_rate(waveform, rate, target)
    import torch

    # This process may fork an engine later, and thread pools of OpenMP and oneDNN do not survive a
    # fork. So resampling starts none.
    with _threads_lock:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with _quiet_flags(), torch.inference_mode():
                samples = torch.as_tensor(np.asarray(waveform), dtype=torch.float32)
                resampled: Samples = _resampler(rate, target)(samples).numpy()
        finally:
            torch.set_num_threads(threads)
    return resampled


@contextmanager
def _quiet_flags() -> Iterator[None]:
    """Switch oneDNN off for the ``with`` block, without torch's warning when it is switched on.

    The warning is about TF32 on Intel GPUs, which need not be there.
    """
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@lru_cache(maxsize=32)
def _resampler(rate: int, target: int) -> Any:
    """Return torchaudio's resampler for two rates, whose filter bank is computed once."""
    import torchaudio

    return torchaudio.transforms.Resample(rate, target)


def num_mel_frames(num_samples: int) -> int:
    """Return how many log-mel frames hold a clip's own sound: one per ``HOP`` samples begun."""
    return -(-num_samples // HOP)


def log_mel(
    waveform: Samples,
    *,
    n_mels: Literal[80, 128] = 128,
    normalization: Normalization = "whisper",
    pad_to: Literal["clip", "window"] | int = "clip",
) -> npt.NDArray[np.float32]:
    """Return the log-mel spectrogram of a whole clip.

    The short-time Fourier transform has a Hann window of ``N_FFT`` samples every ``HOP`` samples,
    centred, with the ends reflected; power is mapped to Slaney-scale, Slaney-normalised mel bins
    between 0 and 8 kHz. ``whisper`` is the normalisation of OpenAI's Whisper and transformers'
    ``WhisperFeatureExtractor``: log10, floored 8 below the clip's maximum, then ``(x + 4) / 4``.
    ``mean_variance`` is the natural logarithm brought to zero mean and unit variance in each bin
    over the clip (as in cepstral mean and variance normalisation of an utterance). Both use
    statistics of the whole clip: cut the result into windows, never the waveform (see ``windows``).

    Args:
        waveform: float32 mono at ``MODEL_RATE``.
        n_mels: Number of mel bins.
        normalization: ``whisper`` or ``mean_variance``, as above.
        pad_to: ``clip`` pads the sound with just enough silence that every frame equals that of
            the clip in endless silence, and returns the clip's own frames; ``window`` pads to a
            multiple of ``WINDOW_S``; an integer pads to that many samples.

    Returns:
        float32 ``[n_mels, frames]``, one frame per ``HOP`` samples.

    Raises:
        ValueError: The waveform is empty, or longer than ``pad_to`` samples.
    """
    import torch

    num_samples = len(waveform)
    if num_samples == 0:
        raise ValueError("a log-mel spectrogram needs at least one sample")
    if pad_to == "clip":
        padded = padded_length(num_samples)
    elif pad_to == "window":
        window = WINDOW_S * MODEL_RATE
        padded = math.ceil(num_samples / window) * window
    else:
        padded = pad_to
    if padded < num_samples:
        raise ValueError(f"{num_samples} samples do not fit in pad_to={pad_to}")

    samples = torch.nn.functional.pad(
        torch.as_tensor(np.asarray(waveform), dtype=torch.float32), (0, padded - num_samples)
    )
    spectrum = torch.stft(samples, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True)
    power = spectrum[:, :-1].abs().square()
    mel = (_mel_filters(n_mels) @ power).clamp_(min=1e-10)
    if normalization == "whisper":
        log = mel.log10_()
        log = (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0
    frames = num_mel_frames(num_samples)
    if normalization == "mean_variance":
        log = mel.log_()
        own = log[:, :frames]
        mean = own.mean(dim=1, keepdim=True)
        deviation = own.std(dim=1, keepdim=True, correction=0)
        log = (log - mean) / deviation.clamp_(min=1e-5)
    if pad_to == "clip":
        log = log[:, :frames]
    result: npt.NDArray[np.float32] = log.contiguous().numpy()
    return result


def padded_length(num_samples: int) -> int:
    """Return the length to pad a clip to so that no frame of the clip depends on that length.

    A frame reaches ``N_FFT / 2`` samples to either side of its centre. Frames whose centre lies up
    to ``N_FFT / 2`` samples past the clip still hold some of its sound and count towards its
    maximum; such a frame ends at most ``N_FFT`` samples past the clip. From there on the padding is
    silence, which the transform reflects into silence.

    Args:
        num_samples: Samples of the clip.
    """
    return math.ceil((num_samples + N_FFT) / HOP) * HOP


def windows(spectrogram: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    """Cut a spectrogram ``[n_mels, frames]`` into views of at most ``WINDOW_S`` seconds each."""
    step = WINDOW_S * MODEL_RATE // HOP
    return [spectrogram[:, i : i + step] for i in range(0, spectrogram.shape[1], step)]


@lru_cache(maxsize=4)
def _mel_filters(n_mels: int) -> Any:
    """Return the mel filter bank, torch float32 ``[n_mels, N_FFT // 2 + 1]``."""
    import torchaudio

    bank = torchaudio.functional.melscale_fbanks(
        n_freqs=N_FFT // 2 + 1,
        f_min=0.0,
        f_max=8000.0,
        n_mels=n_mels,
        sample_rate=MODEL_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return bank.T.contiguous()
