"""A folder of clips: decoded as a server decodes them, whatever else lies there, and resumed."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from vllm_mm_ext.composer.training.data import folder_batches
from vllm_mm_ext.composer.training.folder import load_sample, read_folder
from vllm_mm_ext.composer.training.model import fresh_model, tiny_config
from vllm_mm_ext.composer.training.processes import average_gradients, joined
from vllm_mm_ext.composer.training.tokenizer import build_tokenizer
from vllm_mm_ext.composer.training.train import app as train_app
from vllm_mm_ext.composer.training.trainer import Batches, save_checkpoint, saved_rate
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.testing.media import Tone, make_clip

TOKENIZER = build_tokenizer()
CONFIG = tiny_config(TOKENIZER, layers=1)
TURNS = [{"question": "What is it?", "answer": "a clip"}]


def write_folder(path: Path, names: list[str]) -> Path:
    lines = [json.dumps({"video": name, "turns": TURNS}) for name in names]
    (path / "conversations.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    for number in range(2):
        make_clip(path / f"{number}.mp4", width=64, height=64, duration=1, seed=number)
    (path / "bad.mp4").write_bytes(b"no video")
    return write_folder(path, ["0.mp4", "bad.mp4", "1.mp4"])


def test_clips_are_turned_and_heard_on_the_clock_of_the_picture(tmp_path: Path) -> None:
    tone = Tone(440, 1.0, 2.0)
    clip = make_clip(tmp_path / "a.mp4", rotation=90, duration=2, audio=[tone], start_time=1.0)
    one = load_sample(read_folder(write_folder(tmp_path, ["a.mp4"]))[0], CONFIG, 4)
    spec = SamplingSpec(fps=CONFIG.fps, max_frames=4)
    size = SizeRule(kind="fixed", height=64, width=64)
    served = run_job(str(clip.path), DecodeRequest(sampling=spec, size=size, audio="optional"))
    assert served.info.video is not None
    assert served.info.video.rotation == 90
    assert served.frames is not None
    assert served.selection is not None
    assert np.array_equal(one.frames, served.frames)
    assert one.seconds == pytest.approx(served.selection.times, abs=1e-6)
    assert one.sound is not None
    # The sound begins a second before the picture, whose clock counts.
    assert np.abs(one.sound[4_000:12_000]).max() > 0.1


def test_a_file_that_cannot_be_decoded_gives_way_to_the_next_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def batches() -> Batches:
        conversations = read_folder(folder)
        return folder_batches(CONFIG, TOKENIZER, conversations, seed=0, clips=3, frames=2)

    one = batches()
    with caplog.at_level(logging.WARNING):
        whole = [one(step) for step in range(2)]
    assert len(caplog.messages) == 1
    assert "line 2: bad.mp4 is passed over" in caplog.messages[0]
    assert all(len(batch.frames_per_item) == 3 for batch in whole)
    # A training that begins anew at the second step sees the same.
    assert torch.equal(batches()(1).pixel_values, whole[1].pixel_values)


def test_a_folder_of_which_nothing_can_be_decoded_is_an_error(folder: Path) -> None:
    bad = [one for one in read_folder(folder) if one.name == "bad.mp4"]
    with pytest.raises(ValueError, match="none of the files"):
        folder_batches(CONFIG, TOKENIZER, bad, seed=0, clips=1, frames=2)(0)


def test_a_training_is_resumed_with_its_own_shape_and_rate_and_the_same_data_alone(
    folder: Path, tmp_path: Path
) -> None:
    init, out = tmp_path / "init", tmp_path / "out"
    small = tiny_config(TOKENIZER, layers=1)
    small.fps = 1.0
    save_checkpoint(fresh_model(small, 2), TOKENIZER, init)
    data = ["--folder", str(folder), "--clips", "1", "--frames", "2"]

    def train(*arguments: str) -> Result:
        device = ["--device", "cpu", "--fp32"]
        return CliRunner().invoke(train_app, [str(out), *arguments, *device])

    first = train("--init", str(init), *data, "--steps", "1")
    assert first.exit_code == 0, first.output
    assert saved_rate(out) == 2e-5
    # Without --init the shape would be that of the shipped model, which has more layers.
    again = train("--resume", *data, "--steps", "2")
    assert again.exit_code == 0, again.output
    assert saved_rate(out) == 2e-5
    for changed, words in (
        (["--folder", str(folder), "--clips", "2", "--frames", "2"], "clips 1, this one has 2"),
        (["--ramp", "3"], "has folder with"),
    ):
        other = train("--resume", *changed, "--steps", "3")
        assert other.exit_code == 2
        assert words in " ".join(other.output.replace("│", " ").split()), other.output


_OTHER = """
import torch
from vllm_mm_ext.composer.training.processes import average_gradients, joined
with joined():
    one, two, three = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    one.grad = torch.full((2,), 4.0)
    average_gradients([one, two, three])
    assert one.grad.tolist() == [3.0, 3.0] and two.grad.tolist() == [4.0, 4.0]
    assert three.grad is None
"""


def test_processes_average_what_only_one_of_them_has_a_gradient_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for key, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("RANK", "1")
    other = subprocess.Popen([sys.executable, "-c", _OTHER])
    monkeypatch.setenv("RANK", "0")
    threads = torch.get_num_threads()
    try:
        with joined():
            one, two, three = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
            one.grad, two.grad = torch.full((2,), 2.0), torch.full((2,), 8.0)
            average_gradients([one, two, three])
        assert one.grad.tolist() == [3.0, 3.0]
        assert two.grad.tolist() == [4.0, 4.0]
        assert three.grad is None
        assert other.wait(60) == 0
    finally:
        torch.set_num_threads(threads)
        other.kill()
        other.wait()
