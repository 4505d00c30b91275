"""`media_io_kwargs.video` for `video_backend: mm_ext`: keys mean what they mean to vLLM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ECTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from vllm_mm_ext import plugin
from vllm_mm_ext.adapters import runtime as runtime_module
from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector
from vllm_mm_ext.adapters.media.video_kwargs import read_video_kwargs, sampling_for
from vllm_mm_ext.adapters.runtime import attach_runtime, current_runtime
from vllm_mm_ext.config.media_settings import SamplingConfig
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_clip

CONNECTORS = (MediaConnector, MMExtMediaConnector)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kwargs") / "clip.mp4"
    make_clip(path, duration=6, width=64, height=48, fps=10, seed=1)
    return path


@pytest.fixture(autouse=True, scope="module")
def attached() -> Iterator[None]:
    plugin.register()
    sampling = {"fps": 2.0, "max_frames": 64, "min_frames": 2}
    media = {"decode": {"workers": 1}, "sampling": sampling}
    attach_runtime(MMExtConfig.from_additional_config({"mm_ext": {"media": media}}), ModelTraits())
    yield
    current_runtime().close()
    runtime_module._runtime = None


def frames_of(connector: Any, clip: Path, **kwargs: Any) -> int:
    """Frames of the clip for a server with these keys."""
    options = {"video": {"video_backend": "mm_ext", **kwargs}}
    made = connector(media_io_kwargs=options, allowed_local_media_path=str(clip.parent))
    return len(made.fetch_video(clip.as_uri()).media[0])


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"frame_recovery": False},
        {"frame_recovery": True},
        {"backend": "opencv"},
        {"num_ffmpeg_threads": 0, "seek_mode": "exact"},
        {"fps": -1},
    ],
    ids=str,
)
def test_keys_that_change_nothing_fail_no_video(
    connector: Any, clip: Path, kwargs: dict[str, Any]
) -> None:
    assert frames_of(connector, clip, **kwargs) == 12


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize(
    ("kwargs", "frames"),
    [
        ({"max_duration": 3}, 6),
        ({"max_duration": 3, "fps": 3.0}, 9),
        ({"max_duration": 600}, 12),
        ({"max_frames": 8, "num_frames": 5}, 5),
        ({"max_frames": 4, "num_frames": 5}, 4),
        ({"fps": 1}, 6),
    ],
    ids=str,
)
def test_limits_hold(connector: Any, clip: Path, kwargs: dict[str, Any], frames: int) -> None:
    assert frames_of(connector, clip, **kwargs) == frames


@pytest.mark.parametrize("length", [3, 20])
def test_a_maximum_duration_bounds_frames_as_in_vllms_dynamic_loader(
    clip: Path, length: int
) -> None:
    loader = VIDEO_LOADER_REGISTRY.load("opencv_dynamic")
    frames, _ = loader.load_bytes(clip.read_bytes(), fps=2, max_duration=length)
    config = SamplingConfig(fps=2.0, max_frames=64)
    asked = sampling_for(config, read_video_kwargs({"max_duration": length}))
    assert len(frames) == min(asked.max_frames, 12)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_durations", 3),
        ("max_duration", 0),
        ("max_duration", -1),
        ("max_frames", 0.5),
        ("num_frames", 0),
        ("num_frames", True),
        ("fps", "2"),
        ("fps", 61),
        ("frame_recovery", "no"),
    ],
)
def test_what_a_request_gets_wrong_is_a_400_that_names_it(
    connector: Any, clip: Path, key: str, value: Any
) -> None:
    with pytest.raises(VLLMValidationError, match=rf"media_io_kwargs\.video\.{key} = "):
        frames_of(connector, clip, **{key: value})


def engine_config(**video: Any) -> None:
    EngineArgs(
        model=str(checkpoint("qwen2_5_vl")), media_io_kwargs={"video": video}
    ).create_engine_config()


def test_a_server_with_a_wrong_key_does_not_start() -> None:
    with pytest.raises(ValueError, match=r"media_io_kwargs\.video\.max_durations = 3: unknown key"):
        engine_config(video_backend="mm_ext", max_durations=3)
    with pytest.raises(ValueError, match=r"media_io_kwargs\.video\.fps"):
        engine_config(video_backend="mm_ext", fps=0)


def test_a_server_says_which_keys_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        engine_config(video_backend="mm_ext", backend="opencv", max_duration=60)
    (warning,) = [r.getMessage() for r in caplog.records if "media_io_kwargs" in r.getMessage()]
    assert "backend in media_io_kwargs.video has no effect" in warning


def test_a_server_says_when_a_key_hands_videos_to_vllms_loader(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        engine_config(nmu_frames=8, fps=1)
    (warning,) = [r.getMessage() for r in caplog.records if "media_io_kwargs" in r.getMessage()]
    assert "vLLM's own loader reads all videos" in warning
    assert "nmu_frames" in warning
    assert "fps" not in warning.replace("nmu_frames", "")


def test_keys_for_another_loader_are_its_own_affair(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        engine_config(video_backend="opencv", anything=1)
    assert not [r for r in caplog.records if "media_io_kwargs" in r.getMessage()]


@pytest.mark.parametrize("backend", [{}, {"video_backend": "mm_ext"}], ids=["ours", "by name"])
@pytest.mark.parametrize(
    ("kwargs", "frames"),
    [
        # The clip has 60 frames in 6 s; the configured rate is 2.
        ({"num_frames": 20}, 20),
        ({"num_frames": 4}, 4),
        ({"num_frames": 100}, 60),
        ({"num_frames": -1}, 60),
        ({"num_frames": -1, "fps": 5}, 30),
        ({"num_frames": 20, "fps": 5}, 20),
        ({"num_frames": 20, "fps": 1}, 6),
        ({"num_frames": 20, "fps": -1}, 20),
        ({"num_frames": 20, "max_frames": 8}, 8),
        ({"fps": 4}, 24),
    ],
    ids=str,
)
def test_frames_and_rates_are_as_with_vllms_loader(
    clip: Path, backend: dict[str, str], kwargs: dict[str, Any], frames: int
) -> None:
    options = {"video": {**backend, **kwargs}}
    made = MMExtMediaConnector(media_io_kwargs=options, allowed_local_media_path=str(clip.parent))
    assert len(made.fetch_video(clip.as_uri()).media[0]) == frames
    if set(kwargs) == {"num_frames"} or kwargs.get("num_frames") == -1:
        stock, _ = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(clip.read_bytes(), **kwargs)
        assert len(stock) == frames


@pytest.mark.parametrize(
    ("key", "value"), [("num_frames", 0), ("num_frames", 5000), ("fps", 0), ("fps", "2")]
)
def test_a_server_whose_every_video_would_fail_does_not_start(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"video\.{key} = .*mm_ext\.media\.sampling"):
        engine_config(**{key: value})


def test_a_server_says_which_keys_it_took_for_no_settings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        EngineArgs(
            model=str(checkpoint("qwen2_5_vl")), additional_config={"mm-ext": {"media": {}}}
        ).create_engine_config()
    assert [r for r in caplog.records if "'mm-ext' in additional_config" in r.getMessage()]


NO_MEDIA: dict[str, Any] = {"image": 0, "video": 0}


@pytest.mark.parametrize("made_as", [ECTransferConfig, dict])
@pytest.mark.parametrize(
    ("options", "text_only"),
    [
        ({"language_model_only": True}, True),
        ({"limit_mm_per_prompt": NO_MEDIA}, True),
        ({"limit_mm_per_prompt": NO_MEDIA | {"video": 1}}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_text_only_server_leaves_the_host_tier_out_and_says_so(
    options: dict[str, Any], text_only: bool, made_as: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by caplog: with the first configuration vLLM sets its loggers up anew.
    said: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("vllm.mm_ext"), "warning", lambda text, *_: said.append(text)
    )
    transfer = made_as(
        ec_connector="MMExtECConnector",
        ec_role="ec_both",
        ec_connector_module_path="vllm_mm_ext.encoder_cache",
    )
    arguments = EngineArgs(
        model=str(checkpoint("qwen2_5_vl")), ec_transfer_config=transfer, **options
    )
    made = arguments.create_engine_config()
    assert (made.ec_transfer_config is None) is text_only
    assert not made.model_config.multimodal_config.enable_mm_embeds
    assert arguments.ec_transfer_config is transfer
    assert any("takes no media" in text for text in said) is text_only
