"""Where the composer's video and audio tokens stand in a prompt. Pure arithmetic.

Used by the vLLM processor and by training, so that both lay out the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.video.cuts import Run

TimestampTokens = Callable[[float], Sequence[int]]
"""Text tokens of a time in seconds, written before a group of frames."""


def group_starts(seconds: Sequence[float], temporal: int) -> Sequence[float]:
    """Time of the first frame of each group of ``temporal`` frames."""
    return seconds[::temporal]


def interleaved(
    starts: Sequence[float], group_tokens: Sequence[int], audio: Sequence[int], window_s: float
) -> list[Run]:
    """Groups of frames and windows of sound in order of time.

    A window of sound comes first, then the groups whose first frame is shown while it sounds.
    What is shown or heard after the other has ended follows at the end.

    Args:
        starts: Time in seconds of the first frame of each group, ascending.
        group_tokens: Tokens of each group.
        audio: Tokens of each window of the sound, none for silence.
        window_s: Seconds of a window.

    Returns:
        ``(visual, audio)`` tokens; one of the two is 0 in each.
    """
    runs: list[Run] = []
    heard = 0
    for start, tokens in zip(starts, group_tokens, strict=True):
        while heard < len(audio) and heard * window_s <= start:
            runs.append((0, audio[heard]))
            heard += 1
        runs.append((tokens, 0))
    return runs + [(0, tokens) for tokens in audio[heard:]]


def run_tokens(
    config: ComposerConfig,
    runs: Sequence[Run],
    starts: Sequence[float],
    timestamp_tokens: TimestampTokens | None = None,
) -> list[int]:
    """Prompt tokens of some runs.

    Args:
        config: Of the checkpoint.
        runs: As from `interleaved`. A run without audio is a group, even if nothing is left of it.
        starts: Time in seconds of the first frame of each group among ``runs``.
        timestamp_tokens: Needed where ``config.timestamps`` is set.
    """
    ids: list[int] = []
    times: Iterator[float] = iter(starts)
    for visual, audio in runs:
        if audio:
            ids += _sound(config, audio)
            continue
        start = next(times)
        if config.timestamps:
            assert timestamp_tokens is not None
            ids += timestamp_tokens(start)
        ids += [config.frame_token_id] + [config.video_pad_token_id] * visual
    return ids


def video_layout(
    config: ComposerConfig,
    seconds: Sequence[float],
    *,
    pool: int = 1,
    temporal: int = 1,
    audio_samples: int = 0,
    timestamp_tokens: TimestampTokens | None = None,
) -> list[int]:
    """Prompt tokens of one whole video.

    Embeddings take the places of ``video_pad_token_id`` and of ``audio_pad_token_id``, each kind in
    order.

    Args:
        config: Of the checkpoint.
        seconds: Time of each frame from the start of the video, ascending, at least one.
        pool, temporal: The reduction; the checkpoint must support it.
        audio_samples: Samples of the sound at 16 kHz, 0 for silence.
        timestamp_tokens: Needed where ``config.timestamps`` is set.

    Raises:
        ValueError: The checkpoint does not support the reduction, or has no audio tower.
    """
    config.method(pool, temporal)
    starts = group_starts(seconds, temporal)
    runs = interleaved(
        starts,
        [config.frame_tokens(pool)] * len(starts),
        config.audio_tokens(audio_samples),
        config.audio_window_s,
    )
    body = run_tokens(config, runs, starts, timestamp_tokens)
    return [config.video_start_token_id, *body, config.video_end_token_id]


def audio_layout(config: ComposerConfig, samples: int) -> list[int]:
    """Prompt tokens of sound by itself: one ``<audio> … </audio>`` per window.

    Args:
        config: Of the checkpoint.
        samples: At 16 kHz, at least one.

    Raises:
        ValueError: The checkpoint has no audio tower.
    """
    return [token for tokens in config.audio_tokens(samples) for token in _sound(config, tokens)]


def _sound(config: ComposerConfig, tokens: int) -> list[int]:
    pads = [config.audio_pad_token_id] * tokens
    return [config.audio_start_token_id, *pads, config.audio_end_token_id]
