"""Of a transport stream of several programmes, picture and sound are of the same one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.transport_streams import gathered, programmes
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult, SamplingSpec
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip

SAMPLING = SamplingSpec(max_frames=4)
# What is heard, in Hz: stereo with the small picture, mono and stereo with the large one.
SMALL, LARGE_MONO, LARGE = 440.0, 1000.0, 1500.0


def tone(hertz: float) -> list[Tone]:
    return [Tone(hertz, 0.0, 9.0)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("programmes")
    small, large = (
        make_clip(
            folder / f"{width}.ts",
            width=width,
            height=48,
            duration=1,
            audio=tone(hertz),
            channels=channels,
        ).path
        for width, hertz, channels in ((64, SMALL, 2), (128, LARGE_MONO, 1))
    )
    more = make_audio(folder / "more.ts", duration=1, tones=tone(LARGE), channels=2).path
    return str(
        programmes(folder / "both.ts", [small, gathered(folder / "large.ts", [large, more])])
    )


def heard(result: DecodeResult) -> float:
    assert result.audio is not None
    loudest = int(np.abs(np.fft.rfft(result.audio)).argmax())
    return loudest * result.audio_rate / len(result.audio)


@pytest.mark.parametrize(
    ("video_stream", "audio_stream", "width", "hertz"),
    [
        (None, None, 128, LARGE),
        (0, None, 64, SMALL),
        (1, None, 128, LARGE),
        (None, 0, 128, SMALL),
        (0, 1, 64, LARGE_MONO),
    ],
)
def test_the_sound_is_of_the_pictures_programme_unless_chosen(
    both: str, video_stream: int | None, audio_stream: int | None, width: int, hertz: float
) -> None:
    sampling = replace(SAMPLING, video_stream=video_stream)
    request = DecodeRequest(sampling=sampling, audio="optional", audio_stream=audio_stream)
    result = run_job(both, request)
    assert result.frames is not None
    assert result.frames.shape[2] == width
    assert heard(result) == pytest.approx(hertz, abs=5)


def test_sound_alone_is_of_the_programme_that_a_player_shows(both: str) -> None:
    assert heard(run_job(both, DecodeRequest(audio="required"))) == pytest.approx(LARGE, abs=5)
