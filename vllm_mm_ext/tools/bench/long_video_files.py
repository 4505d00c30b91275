"""Recordings of known content as files, what is asked about them, and servers that answer."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from vllm_mm_ext.composer.training.note_language import RECORDING_TASKS
from vllm_mm_ext.composer.training.questions import Question
from vllm_mm_ext.composer.training.recording_file import encode_recording
from vllm_mm_ext.composer.training.recordings import Recording, draw_recording
from vllm_mm_ext.composer.training.samples import HELD_OUT, balanced
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.cli.demo import config_for, shipped_model

TASKS: tuple[str, ...] = RECORDING_TASKS
# Neither those that training shows, nor those of other benchmarks.
_FIRST_SEED = HELD_OUT + 2_000_000
# The server's log then says what each step computed.
_LOGGED = "--enable-logging-iteration-details"


@dataclass(frozen=True)
class Film:
    """A recording as a file, and what is known of it.

    Attributes:
        path: The file.
        minutes: Its length.
        recording: What it shows.
    """

    path: Path
    minutes: int
    recording: Recording

    def questions(self, count: int) -> list[Question]:
        """So many questions about the recording at most, as evenly over the tasks as there are."""
        rng = np.random.default_rng(self.recording.seed)
        return balanced(self.recording.questions(rng), count, rng, weights={})


class Films:
    """Makes films, each once, and keeps them for later runs.

    Args:
        directory: Where the files are kept.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "recordings"
        self.directory.mkdir(parents=True, exist_ok=True)

    def film(self, number: int, minutes: int) -> Film:
        """The film of a number: other numbers have other pictures.

        Servers keep what they know of a film, so measurements that are to find nothing known have
        numbers of their own.
        """
        recording = draw_recording(_FIRST_SEED + number, 60 * minutes)
        path = self.directory / f"{number}-{minutes}min.mp4"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
                made = Path(scratch) / path.name
                encode_recording(recording, made)
                made.rename(path)
        return Film(path, minutes, recording)


@contextlib.contextmanager
def composer_server(
    films: Films, settings: Mapping[str, Any] | None = None, args: Sequence[str] = ()
) -> Iterator[Server]:
    """A server of the composer that ships with the package, configured as it ships.

    Args:
        films: Those that it may read.
        settings: Of ``mm_ext``, instead of those of the file.
        args: More flags.

    Raises:
        RuntimeError: There is no trained checkpoint, or no file of its configuration.
    """
    model, config = shipped_model(), config_for(None, Path())
    if model is None or config is None:
        raise RuntimeError("the package has no trained composer")
    with tempfile.TemporaryDirectory(prefix="long-video-") as scratch:
        file = Path(scratch) / "config.yaml"
        loaded = yaml.safe_load(config.read_text())
        _merge(loaded["additional-config"]["mm_ext"], settings or {})
        file.write_text(yaml.safe_dump(loaded))
        allowed = ("--allowed-local-media-path", str(films.directory))
        with serve(
            model, plugin=True, args=["--config", str(file), *allowed, _LOGGED, *args]
        ) as server:
            yield server


def _merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
