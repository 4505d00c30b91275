"""The options that describe a workload."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.planner.gpu_facts import GIB, UnknownGpuError, gpu_of, known_gpus
from vllm_mm_ext.planner.workload import (
    Image,
    Video,
    WorkloadError,
    read_audios,
    read_images,
    read_videos,
)


def test_videos_are_read_with_all_that_may_be_said_of_them():
    assert read_videos(["60s@2fps:720p"]) == (Video(60.0, fps=2.0),)
    assert (
        read_videos(["2x1h30m@0.5fps:320x240:25fps:hevc:2mbit:silent"])
        == (Video(5400.0, 0.5, 320, 240, 25.0, "hevc", False, 2.0),) * 2
    )
    assert read_audios(["30", "2x1m"]) == (30.0, 60.0, 60.0)
    assert read_images(["2", "1:1024x768"]) == (Image(), Image(), Image(1024, 768))


@given(st.floats(0.1, 8.6e4), st.floats(0.1, 60))
def test_any_length_and_rate_are_read_as_written(seconds, fps):
    (video,) = read_videos([f"{seconds:.3f}s@{fps:.3f}fps"])
    assert video.seconds == pytest.approx(seconds, abs=1e-3)
    assert video.fps == pytest.approx(fps, abs=1e-3)


@pytest.mark.parametrize(
    ("read", "spec", "words"),
    [
        (read_videos, "", ["--video", "no length"]),
        (read_videos, "sixty", ["--video sixty", "no length", "30s, 5m, 2h"]),
        (read_videos, "60s@0fps", ["0fps", "above 0"]),
        (read_videos, "60s:722p", ["722p", "720p", "WIDTHxHEIGHT", "silent"]),
        (read_videos, "60s:720p:480p", ["480p", "second time"]),
        (read_videos, "60s:0mbit", ["0mbit", "bit rate"]),
        (read_audios, "0s", ["--audio 0s", "no length"]),
        (read_images, "two", ["--image two", "for example"]),
        (read_images, "2:9x9", ["--image 2:9x9", "WIDTHxHEIGHT"]),
        (read_images, "1:99999x99999", ["--image 1:99999x99999", "8192x8192"]),
        (read_images, "0", ["--image 0", "from 1 to 256"]),
        (read_images, "9" * 5000, ["from 1 to 256"]),
        (read_videos, "0x60s", ["--video 0x60s", "from 1 to 256"]),
        (read_videos, "257x60s", ["--video 257x60s", "from 1 to 256"]),
        (read_videos, "100000h", ["--video 100000h", "24h"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_option_the_value_and_what_is_valid(
    read, spec, words
):
    with pytest.raises(WorkloadError) as error:
        read([spec])
    assert all(word in str(error.value) for word in words)


def test_videos_at_two_rates_are_refused_as_a_server_samples_at_one():
    with pytest.raises(WorkloadError, match="1 and 2 fps"):
        read_videos(["10s@1fps", "10s@2fps"])


def test_gpus_are_known_by_name_or_by_memory():
    assert gpu_of("H100-80GB", 0) == known_gpus()["h100-80gb"]
    assert gpu_of("24gb", 0).memory_bytes == 24 * GIB
    assert gpu_of("cpu", 5 * GIB).memory_bytes == 5 * GIB
    with pytest.raises(UnknownGpuError, match=r"h100-80gb.*24gb, or cpu"):
        gpu_of("h99", 0)


def test_every_figure_of_a_gpu_has_a_source():
    for gpu in known_gpus().values():
        assert gpu.sources
        assert gpu.bf16_flops
        assert gpu.bandwidth
