"""What a model is told about time: the position of every grid, the written times, the sound.

Families x policies x budgets x clips. Real files are sampled as a decode worker does it, and the
prompt is made as an API server does it. Families that are told nothing about time are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from omni_reference import make_processor, positions, render, sound
from vllm.multimodal.media import MediaWithBytes

from vllm_mm_ext.adapters.models.composer import MMExtComposerForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult, SamplingSpec, SizeRule
from vllm_mm_ext.testing.media import make_clip

Times = npt.NDArray[np.float64]

# Pixels of a frame's sides that need no resizing.
SIDES = {"qwen3_vl": 64, "qwen3_omni": 64}
QWEN = "<|vision_start|><|video_pad|><|vision_end|>"
OMNI = "<|vision_bos|><|VIDEO|><|vision_eos|>"
ROTARY: dict[str, tuple[Any, str]] = {
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, QWEN),
    "qwen2_5_omni": (Qwen2_5OmniForConditionalGeneration, OMNI),
    "qwen3_omni": (Qwen3OmniMoeForConditionalGeneration, QWEN),
}
POLICIES = ("uniform", "adaptive", "keyframe")
CLIPS: dict[str, dict[str, Any]] = {
    "short": {"duration": 4.0, "fps": 25.0},
    "minute": {"duration": 60.0, "fps": 10.0},
    "ntsc": {"duration": 12.3, "fps": 30000 / 1001},
    "slow": {"duration": 20.0, "fps": 1.5},
    "variable": {"duration": 15.0, "fps": 20.0, "vfr": True},
}
# 600 frames bind nowhere.
BUDGETS = {
    "short": (7, 600),
    "minute": (8, 31, 32),
    "ntsc": (16, 600),
    "slow": (9, 600),
    "variable": (8, 600),
}


@dataclass(frozen=True)
class Sampled:
    """A sampled clip; ``shown`` are the seconds from and to which each frame is on screen."""

    result: DecodeResult
    shown: tuple[Times, Times]

    @property
    def fixed_rate(self) -> bool:
        """Whether the frames are those on screen at moments at a fixed rate."""
        assert self.result.selection is not None
        return self.result.selection.step is not None

    @property
    def moments(self) -> tuple[Times, Times]:
        """The earliest and latest time that each pair's first frame may be told at."""
        earliest, latest = (bound[::2] for bound in self.shown)
        return (earliest, latest) if self.fixed_rate else (earliest, earliest)

    def misplaced(self, told: Times, rate: float) -> float:
        """By how many positions a position is further off than rounding makes it, at most.

        Positions at a fixed rate are cut as in transformers, others rounded.
        """
        earliest, latest = self.moments
        if self.fixed_rate:
            return outside(told, earliest * rate - 1, latest * rate)
        return outside(told, earliest * rate - 0.5, latest * rate + 0.5)

    def item(self, family: str, seconds_of_sound: float = 0.0) -> MediaWithBytes:
        """The video as the media connector delivers it, but for its pixels."""
        selection = self.result.selection
        assert selection is not None
        side = SIDES.get(family, 56)
        frames = np.zeros((len(selection.times), side, side, 3), np.uint8)
        track = sound(seconds_of_sound) if seconds_of_sound else None
        times = tuple(selection.times.tolist())
        sampled = SampledFrames(
            frames, digest="clip", times=times, audio=track, step=selection.step, pinned=True
        )
        metadata = {
            "total_num_frames": len(frames),
            "fps": 1.0,
            "duration": float(len(frames)),
            "video_backend": "mm_ext",
            "frames_indices": list(range(len(frames))),
            "do_sample_frames": False,
        }
        return MediaWithBytes((sampled, metadata), b"clip")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("clips")

    @cache
    def clip(name: str) -> str:
        path = folder / f"{name}.mp4"
        make_clip(path, width=64, height=64, gop=23, bframes=2, **CLIPS[name])
        return str(path)

    @cache
    def of(name: str, policy: Any, budget: int, patch: int = 2) -> Sampled:
        # An odd budget stands for a decode without the last frame: an incomplete last grid.
        spec = SamplingSpec(
            policy, fps=2.0, max_frames=budget, multiple_of=1 if budget % patch else patch
        )
        size = SizeRule(kind="max_edge", max_edge=32)
        result = run_job(clip(name), DecodeRequest(sampling=spec, size=size))
        assert result.selection is not None
        assert result.info.packets is not None
        start = result.info.packets.time
        end = np.append(start[1:], start[-1])
        indices = result.selection.indices
        return Sampled(result, (start[indices], end[indices]))

    return of


@cache
def processor(family: str) -> Any:
    classes = {name: model for name, (model, _) in ROTARY.items()}
    classes |= {
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "composer": MMExtComposerForConditionalGeneration,
    }
    made = make_processor(family, classes[family])
    made.segment_tokens = 24
    return made


def cases(sampled: Any, policy: str, **more: Any) -> Iterator[Sampled]:
    for clip, budgets in BUDGETS.items():
        for budget in budgets:
            yield sampled(clip, policy, budget, **more)


def outside(found: Times, earliest: Times, latest: Times) -> float:
    """By how much a time is outside of its bounds, at most."""
    return float(np.maximum(earliest - found, found - latest).max())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ROTARY)
def test_every_grid_has_the_position_of_its_first_frame(sampled, family, policy):
    model, mark = ROTARY[family]
    ours = processor(family)
    config, rate = ours.info.get_hf_config(), ours.positions_per_second
    for case in cases(sampled, policy):
        result = render(ours, mark, {"video": [case.item(family)]})
        found, _ = positions(model, ours, result)
        visual = found[0][np.asarray(result["prompt_token_ids"]) == config.video_token_id]
        # One token stands before the video.
        told = visual.reshape(len(case.moments[0]), -1)[:, 0] - 1
        assert case.misplaced(told, rate) <= 0
        assert (np.diff(visual) >= 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mean_time_of_every_pair_of_frames_is_written(sampled, policy):
    """Qwen3-VL, whose processor the model with experts has as well."""
    ours = processor("qwen3_vl")
    for case in cases(sampled, policy):
        result = render(ours, QWEN, {"video": [case.item("qwen3_vl")]})
        text = ours.info.get_tokenizer().decode(result["prompt_token_ids"])
        told = np.array(re.findall(r"<(\d+\.\d) seconds>", text), np.float64)
        first, second = case.shown[0][::2], case.shown[0][1::2]
        mean = (first + np.append(second, first[len(second) :])) / 2
        assert outside(told, mean, mean) <= 0.0501  # Tenths of a second are written.


@pytest.mark.parametrize("policy", POLICIES)
def test_a_composer_is_told_the_time_of_every_frame(sampled, policy):
    ours = processor("composer")
    for case in cases(sampled, policy, patch=1):
        result = render(ours, "<|video_pad|>", {"video": [case.item("composer")]})
        fields = [item["video_grid_positions"].data for item in result["mm_kwargs"]["video"]]
        told = np.concatenate([one.numpy() for one in fields]) / 1e6
        assert outside(told, case.shown[0], case.shown[0]) <= 1e-6


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni"])
def test_every_grid_stands_beside_the_sound_of_its_time(sampled, family, policy):
    """After the sound before it: all of it, or that of all two-second chunks before its own."""
    model, mark = ROTARY[family]
    ours = processor(family)
    config, rate = ours.info.get_hf_config(), ours.positions_per_second
    unit = 50 if family == "qwen2_5_omni" else 1
    for case in cases(sampled, policy):
        seconds = float(case.shown[1][-1]) + 2.0
        result = render(ours, mark, {"video": [case.item(family, seconds)]})
        ids = np.asarray(result["prompt_token_ids"])
        is_video, is_audio = ids == config.video_token_id, ids == config.audio_token_id
        earliest, latest = case.moments
        heard = np.cumsum(is_audio)[is_video].reshape(len(earliest), -1)
        assert (heard == heard[:, :1]).all()  # No grid is cut by sound.
        if unit > 1:
            assert (heard[:, 0] >= earliest * rate // unit * unit).all()
            assert (heard[:, 0] <= latest * rate // unit * unit).all()
        else:
            assert outside(heard[:, 0], earliest * rate, latest * rate + 1) <= 1e-6
        found, _ = positions(model, ours, result)
        start = int(found[0][is_audio][0])
        assert (found[0][is_audio] == start + np.arange(is_audio.sum())).all()
        told = found[0][is_video].reshape(len(earliest), -1)[:, 0] - start
        assert case.misplaced(told, rate) <= 0


def test_eight_frames_of_a_minute_are_told_to_span_the_minute(sampled):
    ours = processor("qwen2_5_vl")
    result = render(ours, QWEN, {"video": [sampled("minute", "uniform", 8).item("qwen2_5_vl")]})
    found, _ = positions(ROTARY["qwen2_5_vl"][0], ours, result)
    ids = np.asarray(result["prompt_token_ids"])
    visual = found[0][ids == ours.info.get_hf_config().video_token_id]
    # The first frames of the pairs are at 0, 17.1, 34.2 and 51.3 s; there are two positions a
    # second.
    assert sorted(set((visual - 1).tolist())) == [0, 34, 68, 103]
