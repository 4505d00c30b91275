"""Training from a folder of clips with conversations.

::

    folder/
      conversations.jsonl
      clips/a.mp4 ...

Each line of ``conversations.jsonl`` is ``{"video": "clips/a.mp4", "turns": [{"question": "...",
"answer": "...", "task": "colour"}, ...]}``; ``task`` may be left out. A video may stand on any
number of lines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from vllm_mm_ext.composer.training.questions import Question
from vllm_mm_ext.composer.training.render import Frames, Samples
from vllm_mm_ext.composer.training.samples import Sample
from vllm_mm_ext.media.audio.waveforms import MODEL_RATE, resample

CONVERSATIONS = "conversations.jsonl"


@dataclass(frozen=True)
class Conversation:
    """A video file and what is said about it."""

    video: Path
    turns: tuple[Question, ...]


def read_folder(folder: Path) -> list[Conversation]:
    """All conversations of a folder.

    Raises:
        ValueError: A line is not as it must be. The message names the line and what is wrong.
        FileNotFoundError: There is no ``conversations.jsonl``.
    """
    found = []
    text = (folder / CONVERSATIONS).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(_conversation(folder, json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{CONVERSATIONS}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{folder / CONVERSATIONS} holds no conversation")
    return found


def _conversation(folder: Path, given: Any) -> Conversation:
    if not isinstance(given, dict) or not isinstance(given.get("video"), str):
        raise ValueError('it must be {"video": file, "turns": [{"question", "answer"}]}')
    video = folder / given["video"]
    if not video.is_file():
        raise ValueError(f"there is no file {given['video']!r}")
    turns = given.get("turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError("turns must be a list of at least one question with its answer")
    asked = []
    for turn in turns:
        question, answer = turn.get("question"), turn.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"question and answer must be text, got {turn!r}")
        asked.append(Question(turn.get("task", "all"), question.strip(), answer.strip()))
    return Conversation(video, tuple(asked))


def load_sample(conversation: Conversation, frames: int, fps: float, size: int) -> Sample:
    """A conversation with the frames and the sound of its video, decoded.

    Args:
        conversation: Of a folder.
        frames: Frames at most, evenly spread.
        fps: Frames per second at most.
        size: Width and height that frames are scaled to.

    Raises:
        ValueError: The file has no video frames.
    """
    with av.open(str(conversation.video)) as container:
        pictures = [(float(f.time), f) for f in container.decode(video=0) if f.time is not None]
        if not pictures:
            raise ValueError(f"{conversation.video.name} has no video frames")
        first, last = pictures[0][0], pictures[-1][0]
        # The last picture is shown as long as the others are on average.
        length = (last - first) * len(pictures) / max(1, len(pictures) - 1)
        count = max(1, min(frames, round(length * fps), len(pictures)))
        at = np.linspace(0, len(pictures), count, endpoint=False).astype(int)
        chosen = [pictures[int(index)] for index in at]
        images: Frames = np.stack(
            [
                f.to_ndarray(format="rgb24", width=size, height=size, interpolation="AREA")
                for _, f in chosen
            ]
        )
    return Sample(
        frames=images,
        seconds=[second - first for second, _ in chosen],
        sound=_sound(conversation.video),
        turns=list(conversation.turns),
        independent=False,
    )


def _sound(path: Path) -> Samples | None:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout="mono")
        parts = [
            out.to_ndarray()[0]
            for frame in container.decode(stream)
            for out in resampler.resample(frame)
        ]
        rate = int(stream.rate or MODEL_RATE)
    return resample(np.concatenate(parts).astype(np.float32), rate) if parts else None
