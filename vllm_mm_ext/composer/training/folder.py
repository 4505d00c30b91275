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
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_mm_ext.composer.configuration import SAMPLE_RATE, ComposerConfig
from vllm_mm_ext.composer.training.processes import world
from vllm_mm_ext.composer.training.questions import Question
from vllm_mm_ext.composer.training.samples import Sample
from vllm_mm_ext.errors import MediaError, UnreadableMediaError, by_decoder
from vllm_mm_ext.media.audio.waveforms import resample
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule

CONVERSATIONS = "conversations.jsonl"
# Of a clip that has as many, as a server takes by default.
_LEAST_FRAMES = 4


@dataclass(frozen=True)
class Conversation:
    """A video file and what is said about it.

    Attributes:
        line: Number of its line in ``conversations.jsonl``, from 1.
        name: Of the file, as the line has it.
        video: The file.
        turns: Questions with their answers.
    """

    line: int
    name: str
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
                found.append(_conversation(folder, number, json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{CONVERSATIONS}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{folder / CONVERSATIONS} holds no conversation")
    return found


def _conversation(folder: Path, line: int, given: Any) -> Conversation:
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
        if not isinstance(turn, dict):
            raise ValueError(f'a turn must be {{"question", "answer"}}, got {turn!r}')
        question, answer = turn.get("question"), turn.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"question and answer must be text, got {turn!r}")
        asked.append(Question(turn.get("task", "all"), question.strip(), answer.strip()))
    return Conversation(line, given["video"], video, tuple(asked))


def digest_of(conversations: Sequence[Conversation]) -> str:
    """A short digest of what is asked about which files, wherever the folder lies."""
    said = [(one.name, [(turn.text, turn.answer) for turn in one.turns]) for one in conversations]
    return str(blake3(json.dumps(said).encode()).hexdigest(8))


def load_sample(conversation: Conversation, config: ComposerConfig, frames: int) -> Sample:
    """A conversation with the frames and the sound of its video, as a server gives them to a model.

    Args:
        conversation: Of a folder.
        config: Of the model.
        frames: Frames at most; they are sampled uniformly, ``config.fps`` of them a second.

    Raises:
        MediaError, OSError: The file cannot be decoded.
    """
    side = int(config.vision_config.image_size)
    request = DecodeRequest(
        sampling=SamplingSpec(
            fps=config.fps, max_frames=frames, min_frames=min(_LEAST_FRAMES, frames)
        ),
        size=SizeRule(kind="fixed", height=side, width=side),
        audio="optional" if config.hears else "none",
        threads=1 if world() > 1 else 0,
        # What is decoded must not depend on how fast: a resumed training sees the same.
        limits=DecodeLimits(timeout_s=math.inf, max_frames=frames),
    )
    try:
        result = run_job(str(conversation.video), request)
    except Exception as error:
        if isinstance(error, MediaError | OSError) or not by_decoder(error):
            raise
        raise UnreadableMediaError(f"The media could not be decoded: {error}.") from error
    assert result.frames is not None
    assert result.selection is not None
    sound = result.audio
    return Sample(
        frames=result.frames,
        # Whole microseconds, as when served.
        seconds=[round(second, 6) for second in result.selection.times.tolist()],
        sound=None if sound is None else resample(sound, result.audio_rate, SAMPLE_RATE),
        turns=list(conversation.turns),
        independent=False,
    )
