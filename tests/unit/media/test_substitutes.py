"""Where chosen frames do not decode, others are chosen: N asked give N."""

from __future__ import annotations

import contextlib
import gc
import weakref

import av
import numpy as np
import pytest
from damaged_files import damage
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.errors import MediaTooLargeError, UnreadableMediaError
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.substitutes import decode_chosen
from vllm_mm_ext.media.types import DecodeRequest, SamplingSpec
from vllm_mm_ext.testing.media import Tone, make_clip, read_stamp


def shown_in_order(path) -> dict[int, int]:
    """What decoding from the start shows: timestamp of each frame to its stamp."""
    shown = {}
    with av.open(str(path)) as reader:
        context = reader.streams.video[0].codec_context
        for packet in reader.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                for frame in context.decode(packet if packet.size else None):
                    shown[frame.pts] = read_stamp(frame.to_ndarray(format="rgb24"))
    return shown


def take(path, policy, count, **spec):
    sampling = SamplingSpec(policy, fps=1.0, max_frames=count, min_frames=count, **spec)
    return run_job(str(path), DecodeRequest(sampling=sampling, threads=2))


@pytest.mark.parametrize("policy", ["uniform", "keyframe", "adaptive"])
@pytest.mark.parametrize(
    ("codec", "gop", "broken"),
    [
        ("libx264", 15, range(40, 110)),
        ("libx264", 150, range(75, 150)),
        ("mjpeg", 1, range(10, 140)),
        ("mjpeg", 1, range(0, 150, 3)),
        ("libx264", 15, [0, 60, 61, 90]),
        ("mpeg4", 15, [60, 61, 90, 105]),
    ],
)
def test_as_many_frames_as_asked_and_each_is_the_one_at_its_time(
    tmp_path, policy, codec, gop, broken
):
    whole = make_clip(tmp_path / "a.mp4", codec=codec, gop=gop, duration=5, stamp=True).path
    damage(whole, tmp_path / "b.mp4", set(broken))
    result = take(tmp_path / "b.mp4", policy, 16)
    indices, table = result.selection.indices, result.info.packets
    assert len(indices) == len(result.frames) == 16
    assert (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(result.selection.times, table.time[indices])
    shown = shown_in_order(tmp_path / "b.mp4")
    assert [read_stamp(frame) for frame in result.frames] == [shown[p] for p in table.pts[indices]]


def test_frames_asked_by_index_are_not_replaced(tmp_path):
    whole = make_clip(tmp_path / "a.mp4", codec="mjpeg", duration=1, stamp=True).path
    damage(whole, tmp_path / "b.mp4", {3})
    result = take(tmp_path / "b.mp4", "explicit", 3, indices=(2, 3, 4))
    assert result.selection.indices.tolist() == [2, 4]


def test_a_replaced_frame_ends_the_even_step(tmp_path):
    whole = make_clip(tmp_path / "a.mp4", codec="mjpeg", duration=4, stamp=True).path
    damage(whole, tmp_path / "b.mp4", {30})
    request = DecodeRequest(sampling=SamplingSpec("uniform", fps=1.0, min_frames=1))
    assert run_job(str(whole), request).selection.step == 1.0
    result = run_job(str(tmp_path / "b.mp4"), request)
    assert len(result.frames) == 4
    assert result.selection.step is None


def test_a_file_without_a_frame_that_decodes_is_refused(tmp_path):
    whole = make_clip(tmp_path / "a.mp4", codec="mjpeg", duration=1).path
    damage(whole, tmp_path / "b.mp4", set(range(30)))
    with pytest.raises(UnreadableMediaError, match="None of the chosen"):
        take(tmp_path / "b.mp4", "uniform", 8)


@settings(max_examples=200)
@given(st.data())
def test_the_frames_that_remain_are_right_and_in_order(data):
    size = data.draw(st.integers(1, 60))
    good = data.draw(st.sets(st.integers(0, size - 1)))
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))), np.int64)
    out = np.zeros((len(chosen), 1, 1, 3), np.uint8)
    passes = 0

    def decode(rows, into, seen):
        nonlocal passes
        passes += 1
        assert (np.diff(rows) > 0).all()
        fine = [i for i, row in enumerate(rows.tolist()) if row in good]
        into[fine] = rows[fine, None, None, None]
        seen.update(rows[fine].tolist())
        return np.array(fine, np.int64)

    rows = decode_chosen(decode, np.arange(size) / 25, chosen, out, substitute=True)
    assert passes <= 4
    assert set(rows.tolist()) <= good
    assert (np.diff(rows) > 0).all()
    assert good.intersection(chosen.tolist()) <= set(rows.tolist())
    np.testing.assert_array_equal(out[: len(rows), 0, 0, 0], rows)


def test_no_further_frames_are_tried_when_the_time_is_gone() -> None:
    passes = []

    def decode(rows, *_):
        passes.append(len(rows))
        return np.arange(1)

    out, chosen = np.zeros((4, 1, 1, 3), np.uint8), np.array([0, 5, 10, 15])
    rows = decode_chosen(decode, np.arange(60.0), chosen, out, substitute=True, seconds=-1.0)
    assert (rows.tolist(), passes) == ([0], [4])


def test_a_job_that_runs_out_of_memory_is_done_without_keeping_pictures(tmp_path) -> None:
    path = make_clip(tmp_path / "a.mp4", duration=2, stamp=True).path
    spec = SamplingSpec("adaptive", fps=4.0, max_frames=8, min_frames=8)
    request = DecodeRequest(sampling=spec, threads=1)
    wanted = run_job(str(path), request)
    refused, reserved = [], []

    def allocate(shape, dtype):
        if not refused:
            refused.append(shape)
            raise MemoryError
        return np.empty(shape, dtype)

    result = run_job(str(path), request, allocate, reserved.append)
    assert len(refused) == len(reserved) == 1
    np.testing.assert_array_equal(result.frames, wanted.frames)
    with pytest.raises(MediaTooLargeError, match="needs more memory"):
        run_job(str(path), request, lambda _, dtype: np.empty(1 << 60, dtype))


@pytest.mark.parametrize(
    ("policy", "failing"),
    [
        ("uniform", "decode.decoders.pyav_decoder.write_rgb"),
        ("adaptive", "decode.decoders.pyav_decoder.write_rgb"),
        ("uniform", "audio.audio_track.to_mono"),
    ],
)
def test_a_job_that_fails_holds_no_memory_afterwards(tmp_path, monkeypatch, policy, failing):
    path = str(make_clip(tmp_path / "a.mp4", duration=2, gop=10, audio=[Tone(440, 0, 2)]).path)
    spec = SamplingSpec(policy, fps=8.0, max_frames=16, min_frames=16)
    request = DecodeRequest(sampling=spec, threads=2, audio="required")
    made = []

    def allocate(shape, dtype):
        array = np.empty(shape, dtype)
        made.append(weakref.ref(array))
        return array

    def fail(*_):
        raise UnreadableMediaError("a picture or a sound")

    monkeypatch.setattr(f"vllm_mm_ext.media.{failing}", fail)
    gc.disable()
    try:
        with contextlib.suppress(UnreadableMediaError):
            run_job(path, request, allocate)
        assert made
        assert all(array() is None for array in made)
    finally:
        gc.enable()
