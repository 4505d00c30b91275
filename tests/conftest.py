"""Fixtures shared by the tests that need a real vLLM engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip
from vllm_mm_ext.testing.server import Server, serve_both


@dataclass(frozen=True)
class ServerPair:
    """Stock vLLM and the plugin on the same checkpoint, side by side."""

    family: str
    stock: Server
    plugin: Server


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
