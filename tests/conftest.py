"""Fixtures shared by the tests that need a real vLLM engine."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from planned import PlannedServer

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip
from vllm_mm_ext.testing.server import Server, serve, serve_both

# No test fails for the time that an example takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Files with the most engines; two files run at a time, so the longest begin.
LONGEST = (
    "test_segments_engine.py",
    "test_golden_stock.py",
    "test_composer_engine.py",
    "test_per_frame_engine.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, then the others with engines, then the rest."""

    def rank(item: pytest.Item) -> int:
        if item.path.name in LONGEST:
            return LONGEST.index(item.path.name)
        return len(LONGEST) + (item.path not in with_engines)

    with_engines = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=rank)


@dataclass(frozen=True)
class ServerPair:
    """Stock vLLM and the plugin on the same checkpoint, side by side."""

    family: str
    stock: Server
    plugin: Server


def pytest_runtest_setup() -> None:
    """Let pytest see what is logged, whichever test has imported vLLM before.

    vLLM then keeps the records of its loggers to itself, and the tests of commands that log only
    errors make it drop all others.
    """
    # What vLLM imports for its SageMaker routes lets the root logger log errors alone.
    logging.getLogger().setLevel(logging.WARNING)
    logger = logging.getLogger("vllm")
    logger.propagate = True
    if logger.level > logging.INFO:
        logger.setLevel(logging.INFO)


@pytest.fixture(scope="session")
def golden_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of small clips, pictures and sounds, all different from each other."""
    directory = tmp_path_factory.mktemp("golden-media")
    make_clip(directory / "shapes.mp4", duration=3.0, seed=1)
    make_clip(directory / "pan.mp4", duration=4.0, scene="pan", seed=2, gop=250, bframes=2)
    make_clip(directory / "cuts.avi", duration=3.0, scene="cuts", seed=3, codec="mpeg4", fps=25)
    make_clip(directory / "sound.mp4", duration=3.0, seed=4, audio=[Tone(440.0, 0.0, 3.0)], fps=24)
    make_audio(directory / "low.wav", tones=[Tone(300.0, 0.0, 2.0)])
    make_audio(directory / "high.wav", tones=[Tone(1500.0, 0.5, 2.0)], sample_rate=16000)
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        pixels = rng.integers(0, 255, (160, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / name)
    return directory


@pytest.fixture(scope="session")
def golden_pair(
    request: pytest.FixtureRequest,
    golden_media: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerPair]:
    """Both servers of the family given as parameter; pytest keeps one pair at a time."""
    family: str = request.param
    # Stock's own choice of frames, undisturbed: native size and without the sound of videos.
    config = {
        "media": {
            "sampling": {"policy": "stock"},
            "resize": "native",
            "audio": {"in_video": "off"},
        }
    }
    args = ["--allowed-local-media-path", str(golden_media), "--max-model-len", "8192"]
    with serve_both(
        checkpoint(family),
        args=args,
        additional_config={"mm_ext": config},
        log_dir=tmp_path_factory.mktemp(family),
    ) as (stock, plugin):
        yield ServerPair(family, stock, plugin)


@pytest.fixture(scope="session")
def planned_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlannedServer]:
    """A tiny Qwen2.5-VL with a context that a long clip does not fit at full quality."""
    files = tmp_path_factory.mktemp("planned")
    make_clip(files / "short.mp4", duration=4, seed=11)
    make_clip(files / "other.mp4", duration=6, scene="pan", seed=12)
    make_clip(files / "long.mp4", width=320, height=240, fps=4, duration=120, seed=13)
    config = {
        "media": {"sampling": {"fps": 2.0, "max_frames": 64, "min_frames": 2}},
        "segments": {"tokens": 64},
        "reports": {"cache_hits": True},
    }
    args = ["--allowed-local-media-path", str(files), "--max-model-len", "2048"]
    args += ["--limit-mm-per-prompt", '{"video": 4, "image": 2}']
    args += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    model = checkpoint("qwen2_5_vl")
    with serve(model, plugin=True, args=args, additional_config={"mm_ext": config}) as server:
        yield PlannedServer(server, server.client(), files)


def pytest_collection_finish() -> None:
    """Spare every later collection of garbage what vLLM and torch made when they were imported."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
