"""A folder of clips: decoded as a server decodes them, whatever else lies there, and resumed."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
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


def train(out: Path, folder: Path | None, *arguments: object) -> Result:
    data = [] if folder is None else ["--folder", folder, "--frames", 2]
    given = [out, *data, *arguments, "--device", "cpu", "--fp32"]
    return CliRunner().invoke(train_app, [str(one) for one in given])


def refusal(done: Result) -> str:
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of fewer layers than the shipped model's, with dropout."""
    path = tmp_path_factory.mktemp("init")
    small = tiny_config(TOKENIZER, layers=1)
    small.fps = 1.0
    small.text_config.attention_dropout = 0.5
    save_checkpoint(fresh_model(small, 2), TOKENIZER, path)
    return path


@pytest.fixture(scope="module")
def one_step(init: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of one step wrote."""
    path = tmp_path_factory.mktemp("out")
    done = train(path, folder, "--init", init, "--clips", 1, "--steps", 1)
    assert done.exit_code == 0, done.output
    return path


def test_a_training_that_was_resumed_is_the_one_that_was_not_interrupted(
    init: Path, one_step: Path, folder: Path, tmp_path: Path
) -> None:
    resumed, whole = shutil.copytree(one_step, tmp_path / "resumed"), tmp_path / "whole"
    assert saved_rate(resumed) == 2e-5
    for done in (
        train(resumed, folder, "--resume", "--clips", 1, "--steps", 2),
        train(whole, folder, "--init", init, "--clips", 1, "--steps", 2),
    ):
        assert done.exit_code == 0, done.output
    assert saved_rate(resumed) == 2e-5
    one, other = (load_file(path / "model.safetensors") for path in (resumed, whole))
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_training_is_resumed_with_the_same_data_alone_where_its_state_names_them(
    one_step: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["--resume", "--steps", 2]
    done = train(one_step, folder, *more, "--clips", 2)
    assert "clips 1, this one has 2" in refusal(done)
    assert "has folder with" in refusal(train(one_step, None, *more, "--ramp", 3))

    earlier = shutil.copytree(one_step, tmp_path / "earlier")
    state = torch.load(earlier / "training_state.pt", weights_only=True)
    del state["data"]
    torch.save(state, earlier / "training_state.pt")
    done = train(earlier, folder, *more, "--clips", 2)
    assert done.exit_code == 0, done.output
    assert "is not in its state" in caplog.text


def test_a_training_whose_config_was_changed_is_not_resumed(
    one_step: Path, folder: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(one_step, tmp_path / "changed")
    told = json.loads((changed / "config.json").read_text())
    told["reductions"] += [{"pool": 4, "temporal": 2}]
    (changed / "config.json").write_text(json.dumps(told))
    done = train(changed, folder, "--resume", "--clips", 1, "--steps", 2)
    assert "changed one is trained with --init" in refusal(done)


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
