import json
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vllm_mm_ext.media.audio.waveforms import resample
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeRequest, SamplingSpec, VideoStream
from vllm_mm_ext.testing.media import Event, Tone, make_audio, make_clip
from vllm_mm_ext.tools.cli.common import clock
from vllm_mm_ext.tools.cli.main import app
from vllm_mm_ext.tools.cli.token_count import FAMILIES, FamilyName, count_tokens

runner = CliRunner()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "a <b> & c.mp4"
    make_clip(
        path,
        width=160,
        height=90,
        duration=8,
        scene="shapes",
        events=[Event("flash", 5.0, 5.4)],
        audio=[Tone(440, 1.0, 2.0)],
    )
    return path


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("policy", ["uniform", "keyframe", "adaptive"])
def test_sample_prints_frames_within_budget_in_order(clip: Path, policy: str) -> None:
    result = runner.invoke(
        app, ["sample", str(clip), "--policy", policy, "--max-frames", "6", "--json"]
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["duration"] == pytest.approx(8, abs=0.1)
    times = [frame["time"] for frame in data["frames"]]
    indices = [frame["index"] for frame in data["frames"]]
    assert 1 <= len(times) <= 6
    assert times == sorted(times)
    assert indices == sorted(set(indices))
    assert np.allclose(times, np.array(indices) / 30, atol=1e-3)
    assert (data["profile"] is not None) == (policy == "adaptive")


def test_sample_profile_lines_up(clip: Path) -> None:
    result = runner.invoke(app, ["sample", str(clip), "--json"])
    profile = json.loads(result.stdout)["profile"]
    assert len(profile["time"]) == len(profile["container"]) == len(profile["confirmed"])


def test_sample_prints_a_table_without_json(clip: Path) -> None:
    result = runner.invoke(app, ["sample", str(clip), "--max-frames", "5"])
    assert result.exit_code == 0, result.output
    assert "adaptive" in result.stdout


def test_sample_writes_the_frames_and_the_sound_that_a_model_gets(
    clip: Path, tmp_path: Path
) -> None:
    """The files hold what a decode job for the model returns, to the pixel and 16-bit sample."""
    wav, frames = tmp_path / "o.wav", tmp_path / "frames"
    command = ["sample", str(clip), "--max-frames", "5", "--family", "qwen2.5-vl", "--json"]
    result = runner.invoke(app, [*command, "--wav", str(wav), "--frames", str(frames)])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    expected = run_job(
        str(clip),
        DecodeRequest(
            sampling=SamplingSpec(policy="adaptive", max_frames=5, multiple_of=2),
            size=FAMILIES[FamilyName.qwen25_vl].rule,
            audio="optional",
        ),
    )
    assert expected.frames is not None
    names = [f"{frame['index']:06d}_{frame['time']:.6f}s.png" for frame in data["frames"]]
    assert sorted(path.name for path in frames.iterdir()) == names
    for name, pixels in zip(names, expected.frames, strict=True):
        assert np.array_equal(np.asarray(Image.open(frames / name)), pixels)
    with wave.open(str(wav)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16000, 1, 2)
        written = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32768
    assert data["sound_s"] == pytest.approx(len(written) / 16000)
    assert expected.audio is not None
    heard = resample(expected.audio, expected.audio_rate)
    assert np.abs(written - np.clip(heard, -1, 1)).max() <= 1 / 32768


def test_sample_writes_the_sound_of_a_file_without_pictures(tmp_path: Path) -> None:
    sound, wav = tmp_path / "tone.wav", tmp_path / "o.wav"
    with wave.open(str(sound), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(np.arange(8000, dtype="<i2").tobytes())
    result = runner.invoke(app, ["sample", str(sound), "--json", "--wav", str(wav)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sound_s"] == 0.5
    with wave.open(str(wav)) as written:
        assert written.readframes(8000) == np.arange(8000, dtype="<i2").tobytes()
    assert runner.invoke(app, ["sample", str(sound), "--json"]).exit_code == 1


def _two_of_each(path: Path) -> Path:
    """Two videos, of 48 and 64 pixels a side, and two sounds, of an amplitude of 0.1 and 0.2."""
    with av.open(str(path), "w") as container:
        videos: list[Any] = [container.add_stream("mpeg4", rate=10) for _ in range(2)]
        sounds: list[Any] = [container.add_stream("pcm_s16le", rate=16000) for _ in range(2)]
        for side, stream in zip((48, 64), videos, strict=True):
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for stream in sounds:
            stream.layout = "mono"
        for side, stream in zip((48, 64), videos, strict=True):
            for _ in range(10):
                picture = np.full((side, side, 3), 2 * side, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        for level, stream in zip((0.1, 0.2), sounds, strict=True):
            samples = np.full((1, 16000), level * 32768, np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux([*stream.encode(frame), *stream.encode()])
    return path


@pytest.mark.parametrize("number", [0, 1])
def test_sample_takes_the_streams_that_are_asked_for(tmp_path: Path, number: int) -> None:
    path, wav, frames = _two_of_each(tmp_path / "a.mkv"), tmp_path / "o.wav", tmp_path / "frames"
    command = ["sample", str(path), "--json", "--wav", str(wav), "--frames", str(frames)]
    streams = ["--video-stream", str(number), "--audio-stream", str(number)]
    result = runner.invoke(app, [*command, *streams])
    assert result.exit_code == 0, result.output
    assert {Image.open(frame).size for frame in frames.iterdir()} == {(48 + 16 * number,) * 2}
    with wave.open(str(wav)) as sound:
        heard = np.frombuffer(sound.readframes(16000), "<i2") / 32768
    assert float(np.median(heard)) == pytest.approx(0.1 + 0.1 * number, abs=0.001)


@pytest.mark.parametrize(
    ("option", "words"),
    [("--video-stream", "no video stream 2: it has 2"), ("--audio-stream", "no audio stream 2")],
)
def test_a_stream_that_is_not_there_is_one_line_of_error(
    tmp_path: Path, option: str, words: str
) -> None:
    path = _two_of_each(tmp_path / "a.mkv")
    result = runner.invoke(app, ["sample", str(path), option, "2", "--wav", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


def test_not_a_video_is_one_line_of_error(tmp_path: Path) -> None:
    path = tmp_path / "noise.mp4"
    path.write_bytes(bytes(range(256)) * 40)
    for arguments in (["sample"], ["inspect", "-o", str(tmp_path / "x.html")]):
        result = runner.invoke(app, [arguments[0], str(path), *arguments[1:]])
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "x.html").exists()


def test_inspect_page_is_self_contained_and_escaped(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    result = runner.invoke(
        app, ["inspect", str(clip), "-o", str(out), "--max-frames", "8", "--fps", "2"]
    )
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "<b> &" not in text
    assert "url(" not in text
    # One thumbnail per chosen frame of two policies, and the spectrogram.
    thumbnails = sum(link.startswith("data:image/jpeg") for link in page.links)
    assert 2 <= thumbnails <= 16
    assert sum(link.startswith("data:image/png") for link in page.links) == 1
    for words in ("Activity over time", "Waveform", "visual tokens", "audio tokens"):
        assert words in text


def test_inspect_shows_audio_only_files(tmp_path: Path) -> None:
    sound, out = tmp_path / "tone.wav", tmp_path / "out.html"
    make_audio(sound, tones=[Tone(300, 0.0, 2.0)], duration=2.0)
    result = runner.invoke(app, ["inspect", str(sound), "-o", str(out)])
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    assert "Log-mel" in text
    assert "Chosen frames" not in text


def test_inspect_rejects_an_unknown_policy_by_name(clip: Path, tmp_path: Path) -> None:
    result = runner.invoke(
        app, ["inspect", str(clip), "-o", str(tmp_path / "o.html"), "--policies", "best"]
    )
    assert result.exit_code == 2
    assert "best" in result.output


@pytest.mark.parametrize(
    ("family", "visual", "audio"),
    [
        # 1280x720 fits 1008x560 (36 x 20 tokens) under 768 x 28 x 28 pixels; 16 pairs of frames.
        ("qwen2.5-omni", 16 * 36 * 20, 250),
        ("qwen2.5-vl", 16 * 36 * 20, 0),
        # 32 frames of 1280x704 pass 24576 x 32 x 32 pixels; 1152x640 (36 x 20 tokens) do not.
        ("qwen3-vl", 16 * 36 * 20, 0),
        ("llava-onevision", 32 * 196 + 1, 0),
        ("composer-tiny", 32 * 16, 25),
    ],
)
def test_token_counts_of_720p(family: str, visual: int, audio: int) -> None:
    video = VideoStream(0, "h264", 1280, 720, 0, 30.0, False, 300, 10.0, "yuv420p")
    count = count_tokens(FAMILIES[FamilyName(family)], video, 32, 10.0)
    assert (count.visual, count.audio) == (visual, audio)


@pytest.mark.parametrize(
    ("seconds", "digits", "text"),
    [(0, 1, "0:00.0"), (59.96, 1, "1:00.0"), (61.25, 2, "1:01.25"), (3725, 0, "1:02:05")],
)
def test_clock(seconds: float, digits: int, text: str) -> None:
    assert clock(seconds, digits) == text
