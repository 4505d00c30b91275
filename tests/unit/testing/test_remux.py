"""A clip's first part shares its pictures and its sound."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from vllm_mm_ext.testing.media import Tone, make_clip
from vllm_mm_ext.testing.remux import keep_first


def pictures(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        return [
            (round(float(frame.time), 4), frame.to_ndarray(format="rgb24").tobytes())
            for frame in container.decode(video=0)
        ]


def samples(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])


@pytest.mark.parametrize("bframes", [0, 2])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_kept_part_has_the_pictures_and_the_sound_of_the_whole(tmp_path, bframes, suffix):
    whole = tmp_path / f"whole{suffix}"
    tones = [Tone(440.0, 0.0, 2.5), Tone(900.0, 1.0, 5.0)]
    make_clip(whole, duration=5.0, gop=25, bframes=bframes, fps=25, audio=tones, seed=3)
    part = tmp_path / f"part{suffix}"
    kept = keep_first(whole, part, seconds=4.0)
    assert 4.0 - 0.2 <= kept <= 4.0 + 1e-3
    shorter, longer = pictures(part), pictures(whole)
    assert len(shorter) == round(kept * 25)
    assert shorter == longer[: len(shorter)]
    heard, all_heard = samples(part), samples(whole)
    assert kept * 48000 - 1024 <= len(heard) <= kept * 48000 + 3 * 1024
    np.testing.assert_array_equal(heard, all_heard[: len(heard)])


def test_everything_is_kept_when_that_much_is_asked_for(tmp_path):
    whole = tmp_path / "whole.mp4"
    make_clip(whole, duration=2.0, fps=10)
    assert keep_first(whole, tmp_path / "copy.mp4", seconds=9.0) == pytest.approx(2.0)
    assert pictures(tmp_path / "copy.mp4") == pictures(whole)


def test_a_length_that_holds_no_frame_is_refused(tmp_path):
    make_clip(tmp_path / "whole.mp4", duration=1.0)
    with pytest.raises(ValueError, match="no frame"):
        keep_first(tmp_path / "whole.mp4", tmp_path / "part.mp4", seconds=0.0)
