"""Where the composer's video and audio tokens stand in a prompt. Pure arithmetic.

The vLLM processor and training both use this module, so both make the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.video.cuts import Run

TimestampTokens = Callable[[float], Sequence[int]]
"""Returns the text tokens of a time in seconds, which stand before a group of frames."""


def group_starts(seconds: Sequence[float], temporal: int) -> Sequence[float]:
    """Time of the first frame of each group of ``temporal`` frames."""
    return seconds[::temporal]


def interleaved(
    starts: Sequence[float], group_tokens: Sequence[int], audio: Sequence[int], window_s: float
) -> list[Run]:
    """Order groups of frames and windows of sound by time.

    Each window of sound stands before the groups whose first frame is shown while the window
    sounds. The frames or the sound may go on after the other has ended.

    Args:
        starts: Time in seconds of the first frame of each group, ascending.
        group_tokens: Tokens of each group.
        audio: Tokens of each window of the sound; empty for a video without sound.
        window_s: Seconds of a window.

    Returns:
        Numbers of ``(visual, audio)`` tokens of each group and window; one of the two is 0.
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
        config: Configuration of the checkpoint.
        runs: Runs as `interleaved` returns them. A run without audio tokens is a group of frames,
            even if a reduction has left no visual token of the group.
        starts: Time in seconds of the first frame of each group among ``runs``.
        timestamp_tokens: Needed if ``config.timestamps`` is set.

    Returns:
        Token ids.
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

    The model replaces the embeddings of ``video_pad_token_id`` by those of the frames, in order,
    and those of ``audio_pad_token_id`` by those of the sound.

    Args:
        config: Configuration of the checkpoint.
        seconds: Time of each frame from the start of the video, ascending, at least one.
        pool, temporal: The token reduction; the checkpoint must support it.
        audio_samples: Samples of the sound at 16 kHz; 0 for a video without sound.
        timestamp_tokens: Needed if ``config.timestamps`` is set.

    Returns:
        Token ids.

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
    """Prompt tokens of sound without a video: one ``<audio> … </audio>`` per window.

    Args:
        config: Configuration of the checkpoint.
        samples: Number of samples at 16 kHz, at least one.

    Returns:
        Token ids.

    Raises:
        ValueError: The checkpoint has no audio tower.
    """
    return [token for tokens in config.audio_tokens(samples) for token in _sound(config, tokens)]


def _sound(config: ComposerConfig, tokens: int) -> list[int]:
    pads = [config.audio_pad_token_id] * tokens
    return [config.audio_start_token_id, *pads, config.audio_end_token_id]
