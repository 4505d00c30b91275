"""Decoders: the frame returned for index i is frame i, as stock's OpenCV loader counts them."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packet_tables import regular_table

from vllm_mm_ext.errors import MediaTooLargeError, UnreadableMediaError
from vllm_mm_ext.media.decode.decoders import UnsuitableFileError, get_decoder
from vllm_mm_ext.media.decode.decoders import pyav_decoder as pyav_module
from vllm_mm_ext.media.decode.decoders.decord_decoder import check_suitable
from vllm_mm_ext.media.decode.decoders.read_plan import plan_runs, split_lanes
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, PacketTable
from vllm_mm_ext.testing.media import make_clip, read_stamp, truncate

LIMITS = DecodeLimits()

KINDS = {
    "h264": {"name": "a.mp4", "codec": "libx264"},
    "h264-bframes": {"name": "a.mp4", "codec": "libx264", "bframes": 3},
    "h264-open-gop-mkv": {"name": "a.mkv", "codec": "libx264", "bframes": 3, "open_gop": True},
    "h264-ts": {"name": "a.ts", "codec": "libx264", "bframes": 2},
    "h264-late-start": {"name": "a.ts", "codec": "libx264", "start_time": 7.0},
    "h264-intra": {"name": "a.mp4", "codec": "libx264", "gop": 1},
    "h264-rotated": {"name": "a.mp4", "codec": "libx264", "bframes": 2, "rotation": 90},
    "h264-upside-down": {"name": "a.mp4", "codec": "libx264", "rotation": 180},
    "h264-vfr": {"name": "a.mkv", "codec": "libx264", "bframes": 2, "vfr": True},
    "mpeg4": {"name": "a.mp4", "codec": "mpeg4"},
    "mpeg4-bframes": {"name": "a.mp4", "codec": "mpeg4", "bframes": 2},
    "mpeg4-avi": {"name": "a.avi", "codec": "mpeg4", "bframes": 2},
    "hevc-open-gop": {"name": "a.mp4", "codec": "libx265", "bframes": 3, "open_gop": True},
    "vp9": {"name": "a.webm", "codec": "libvpx-vp9"},
}


def opencv_frames(path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames = []
    while capture.grab():
        ok, frame = capture.retrieve()
        assert ok
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return frames


def decode(path, indices, *, name="pyav", size=None, threads=2):
    info = probe(str(path), LIMITS)
    height, width = size or (info.video.height, info.video.width)
    out = np.zeros((len(indices), height, width, 3), np.uint8)
    decoder = get_decoder(name, max_pixels=LIMITS.max_pixels)
    done = decoder.decode(str(path), info, np.array(indices, np.int64), size, out, threads)
    return out, done.tolist()


@pytest.fixture(scope="module", params=KINDS)
def clip(request, tmp_path_factory):
    kind = {"gop": 15, "duration": 2.5, "stamp": True} | KINDS[request.param]
    truth = make_clip(tmp_path_factory.mktemp("clip") / kind.pop("name"), **kind)
    return truth.path, opencv_frames(truth.path)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("step", [1, 4, 9, 31])
def test_native_frames_are_byte_for_byte_those_of_stock(clip, step, threads):
    path, stock = clip
    indices = list(range(step - 1, len(stock), step))
    out, done = decode(path, indices, threads=threads)
    assert done == list(range(len(indices)))
    for index, frame in zip(indices, out, strict=True):
        np.testing.assert_array_equal(frame, stock[index], err_msg=f"frame {index}")


def test_the_planned_way_needs_no_second_pass(clip, monkeypatch):
    path, stock = clip
    monkeypatch.setattr(pyav_module, "read_in_order", lambda *_: pytest.fail("fell back"))
    out, _ = decode(path, [len(stock) // 2, len(stock) - 1], threads=1)
    np.testing.assert_array_equal(out[1], stock[-1])


def test_a_frame_wanted_twice_is_written_twice(clip):
    path, stock = clip
    out, done = decode(path, [3, 3, 20, 20, 20])
    assert done == [0, 1, 2, 3, 4]
    for frame, index in zip(out, [3, 3, 20, 20, 20], strict=True):
        np.testing.assert_array_equal(frame, stock[index])


@pytest.mark.parametrize("kind", ["h264", "h264-bframes", "h264-intra", "vp9"])
def test_decord_returns_the_same_frames(tmp_path, kind):
    options = {"gop": 15, "duration": 2, "stamp": True} | KINDS[kind]
    path = make_clip(tmp_path / options.pop("name"), **options).path
    indices = list(range(0, 60, 7))
    ours, _ = decode(path, indices)
    theirs, done = decode(path, indices, name="decord")
    assert done == list(range(len(indices)))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "kind", ["mpeg4-bframes", "h264-ts", "hevc-open-gop", "h264-open-gop-mkv", "h264-rotated"]
)
def test_decord_refuses_what_it_gets_wrong(tmp_path, kind):
    options = {"gop": 15, "duration": 1} | KINDS[kind]
    path = make_clip(tmp_path / options.pop("name"), **options).path
    with pytest.raises(UnsuitableFileError):
        decode(path, [0, 20], name="decord")


def attempt(name, path, info, max_pixels=LIMITS.max_pixels):
    """Have a backend decode the first frame of a file."""
    out = np.zeros((1, 36, 64, 3), np.uint8)
    return get_decoder(name, max_pixels=max_pixels).decode(
        str(path), info, np.array([0]), (36, 64), out, 1
    )


BACKENDS = pytest.mark.parametrize("backend", ["pyav", "decord"])


@BACKENDS
def test_no_backend_opens_a_file_that_names_other_files(tmp_path, backend):
    inner = make_clip(tmp_path / "inner.mp4", duration=1).path
    info = probe(str(inner), LIMITS)
    assert attempt(backend, inner, info).tolist() == [0]
    script = tmp_path / "script.mp4"
    script.write_text("ffconcat version 1.0\nfile inner.mp4\n")
    with pytest.raises(UnreadableMediaError):
        attempt(backend, script, info)


@BACKENDS
def test_no_backend_opens_a_file_that_is_not_the_probed_one(tmp_path, backend):
    info = probe(str(make_clip(tmp_path / "a.mp4", duration=1).path), LIMITS)
    other = make_clip(tmp_path / "a.mkv", duration=1).path
    with pytest.raises(UnreadableMediaError, match="probed"):
        attempt(backend, other, info)


@BACKENDS
def test_no_backend_decodes_pictures_past_the_limit(tmp_path, backend):
    path = make_clip(tmp_path / "a.mp4", width=64, height=48, duration=1).path
    info = probe(str(path), LIMITS)
    assert attempt(backend, path, info, max_pixels=64 * 48).tolist() == [0]
    with pytest.raises(MediaTooLargeError, match="limit of 3071 pixels"):
        attempt(backend, path, info, max_pixels=64 * 48 - 1)


def test_decord_is_not_given_pictures_larger_than_the_container_says(tmp_path):
    clip = make_clip(tmp_path / "a.mp4", width=640, height=360, duration=1).path
    data = bytearray(clip.read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28  # Width and height of the sample entry.
    assert struct.unpack_from(">HH", data, at) == (640, 360)
    struct.pack_into(">HH", data, at, 64, 36)
    path = tmp_path / "lie.mp4"
    path.write_bytes(data)
    # The probe sees the size of the first picture, unless that is past its limit.
    info = probe(str(path), DecodeLimits(max_pixels=64 * 36))
    assert (info.video.width, info.video.height) == (64, 36)
    for max_pixels in (LIMITS.max_pixels, 64 * 36):
        with pytest.raises(UnsuitableFileError, match="picture"):
            attempt("decord", path, info, max_pixels)
    assert not len(attempt("pyav", path, info, 64 * 36))


@pytest.mark.parametrize("kind", ["h264-bframes", "h264-rotated", "mpeg4"])
@pytest.mark.parametrize("size", [(56, 112), (224, 168), (360, 640)])
def test_resized_frames_look_like_antialiased_native_ones(tmp_path, kind, size):
    import torch
    from torchvision.transforms.v2 import functional

    options = {"duration": 1, "width": 640, "height": 360} | KINDS[kind]
    path = make_clip(tmp_path / options.pop("name"), **options).path
    native, _ = decode(path, [0, 10, 20])
    small, _ = decode(path, [0, 10, 20], size=size)
    chw = torch.from_numpy(native).permute(0, 3, 1, 2)
    expected = functional.resize(
        chw, list(size), interpolation=functional.InterpolationMode.BICUBIC, antialias=True
    )
    difference = np.abs(small.astype(int) - expected.permute(0, 2, 3, 1).numpy()).mean()
    assert difference < 3.0  # of 255


def test_thumbnails_are_small_and_the_right_frames(tmp_path):
    path = make_clip(
        tmp_path / "a.mp4", width=640, height=360, stamp=True, bframes=2, duration=2
    ).path
    info = probe(str(path), LIMITS)
    decoder = get_decoder("auto", max_pixels=LIMITS.max_pixels)
    small = decoder.thumbnails(str(path), info, np.array([0, 7, 7, 50]), 256, 2, ())
    assert small.shape == (4, 216, 256)
    assert [read_stamp(luma) for luma in small[:, :144]] == [0, 7, 7, 50]


def flag_as_keyframe(source, target, wrong) -> None:
    """Copy a file, marking packets in ``wrong`` (decoding order) as keyframes."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        template = reader.streams.video[0]
        stream = writer.add_stream_from_template(template)
        for i, packet in enumerate(reader.demux(template)):
            if packet.dts is None:
                continue
            packet.stream = stream
            if i in wrong:
                packet.is_keyframe = True
            writer.mux(packet)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_are_right_though_keyframes_are_flagged_wrong(tmp_path, codec):
    source = make_clip(tmp_path / "a.mp4", codec=codec, gop=200, duration=2).path
    path = tmp_path / "lie.mp4"
    flag_as_keyframe(source, path, {10, 25, 40})
    stock = opencv_frames(path)
    for threads in (1, 2):
        out, done = decode(path, [5, 30, 45, 59], threads=threads)
        assert done == [0, 1, 2, 3]
        for frame, index in zip(out, [5, 30, 45, 59], strict=True):
            np.testing.assert_array_equal(frame, stock[index])


def test_frames_are_right_without_timestamps(tmp_path):
    source = make_clip(tmp_path / "a.mp4", bframes=2, gop=10, duration=1, stamp=True).path
    path = tmp_path / "raw.h264"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        template = reader.streams.video[0]
        stream = writer.add_stream_from_template(template)
        for packet in reader.demux(template):
            if packet.dts is not None:
                packet.stream = stream
                writer.mux(packet)
    stock = opencv_frames(path)
    out, done = decode(path, [0, 11, 29])
    assert done == [0, 1, 2]
    for frame, index in zip(out, [0, 11, 29], strict=True):
        np.testing.assert_array_equal(frame, stock[index])


def test_frames_an_edit_list_hides_do_not_shift_the_index(tmp_path):
    source = make_clip(tmp_path / "a.mp4", duration=2, gop=60, stamp=True).path
    path = tmp_path / "trimmed.mp4"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        template = reader.streams.video[0]
        stream = writer.add_stream_from_template(template)
        for packet in reader.demux(template):
            if packet.dts is not None:
                packet.pts -= int(1 / template.time_base)
                packet.dts -= int(1 / template.time_base)
                packet.stream = stream
                writer.mux(packet)
    stock = opencv_frames(path)
    out, done = decode(path, [0, 5, len(stock) - 1])
    assert done == [0, 1, 2]
    for frame, index in zip(out, [0, 5, len(stock) - 1], strict=True):
        np.testing.assert_array_equal(frame, stock[index])


def test_frames_past_a_cut_are_left_out_and_the_rest_is_right(tmp_path):
    whole = make_clip(tmp_path / "a.mp4", duration=2, gop=10, faststart=True, stamp=True).path
    path = truncate(whole, tmp_path / "cut.mp4", keep=0.8)
    info = probe(str(path), LIMITS)
    indices = list(range(0, len(info.packets), 3))
    out, done = decode(path, indices)
    assert done
    assert all(read_stamp(out[i]) == indices[i] for i in done[:-1])


@st.composite
def tables(draw):
    """Packet tables of closed or open GOPs with B frames: (table, wanted rows)."""
    order: list[int] = []
    is_key: list[bool] = []
    gops = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    leading = draw(st.integers(0, 2))
    position = 0
    for number, length in enumerate(gops):
        lead = leading if number else 0
        # Shown: lead pictures, the keyframe, the rest. Decoded: the keyframe first.
        key_at = position
        order += [key_at + 1 + i for i in range(lead)]
        order += [key_at]
        order += [key_at + lead + 1 + i for i in range(length - 1)]
        is_key += [False] * lead + [True] + [False] * (length - 1)
        position += lead + length
    n = len(order)
    table = PacketTable(
        pts=np.arange(n, dtype=np.int64) * 512,
        time=np.arange(n) / 30,
        size=np.full(n, draw(st.sampled_from([100, 2_000_000])), np.int32),
        is_key=np.array(is_key),
        time_base=1 / 15360,
        order=np.array(order, np.int64),
    )
    rows = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
    return table, np.array(sorted(rows), np.int64)


@settings(max_examples=300)
@given(tables())
def test_every_wanted_frame_is_covered_from_a_keyframe_it_can_be_decoded_from(case):
    table, rows = case
    runs = plan_runs(table, rows)
    assert sorted(row for run in runs for row in run.wanted) == rows.tolist()
    for run in runs:
        for row in run.wanted:
            assert run.start <= table.order[row] <= run.stop
            # Its own keyframe, the last one shown at or before it, is in the run too.
            key = np.flatnonzero(table.is_key[: row + 1])
            assert len(key) == 0 or run.start <= table.order[key[-1]]
        assert run.start == 0 or (table.is_key[run.key] and table.order[run.key] == run.start)


@settings(max_examples=300)
@given(tables())
def test_runs_do_not_overlap_and_never_cost_more_than_sequential(case):
    table, rows = case
    runs = plan_runs(table, rows)
    for before, after in itertools.pairwise(runs):
        assert before.stop < after.start
    assert sum(run.num_packets for run in runs) <= table.order[rows].max() + 1


@settings(max_examples=300)
@given(tables(), st.integers(1, 8))
def test_lanes_partition_the_rows_and_add_only_open_gop_overlap(case, lanes):
    table, rows = case
    parts = split_lanes(table, rows, lanes)
    assert 1 <= len(parts) <= lanes
    np.testing.assert_array_equal(np.concatenate(parts), rows)
    assert all(len(part) for part in parts)
    apart = sum(run.num_packets for part in parts for run in plan_runs(table, part))
    together = sum(run.num_packets for run in plan_runs(table, rows))
    assert apart <= together + 3 * (len(parts) - 1)  # keyframe and two leading pictures each


def test_keyframes_alone_are_decoded_alone():
    table = PacketTable(
        pts=np.arange(300, dtype=np.int64),
        time=np.arange(300) / 30,
        size=np.full(300, 1000, np.int32),
        is_key=np.arange(300) % 30 == 0,
        time_base=1 / 30,
    )
    runs = plan_runs(table, np.arange(0, 300, 30))
    assert [run.num_packets for run in runs] == [1] * 10


def test_decord_is_not_given_files_in_which_it_loses_its_way(tmp_path):
    info = probe(str(make_clip(tmp_path / "a.mp4", duration=1).path), LIMITS)
    check_suitable(replace(info, packets=regular_table(10_000, 250)))
    with pytest.raises(UnsuitableFileError, match="packets"):
        check_suitable(replace(info, packets=regular_table(10_001, 250)))


@pytest.mark.parametrize("keep_bytes", [0, 3 * 640 * 360, 1 << 30])
@pytest.mark.parametrize("threads", [1, 3])
def test_frames_at_hand_from_thumbnails_are_those_of_a_decode(tmp_path, keep_bytes, threads):
    path = make_clip(tmp_path / "a.mp4", width=640, height=360, bframes=2, gop=20, duration=3).path
    info = probe(str(path), LIMITS)
    rows = np.array([2, 2, 31, 60, 85], np.int64)
    wanted, _ = decode(path, rows)
    out = np.zeros_like(wanted)
    decoder = get_decoder("pyav", max_pixels=LIMITS.max_pixels, keep_bytes=keep_bytes)
    decoder.thumbnails(str(path), info, np.arange(0, 90, 2), 64, threads, range(90))
    assert decoder.decode(str(path), info, rows, None, out, threads).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(out, wanted)


def test_frames_that_were_all_looked_at_are_not_decoded_again(tmp_path, monkeypatch):
    path = make_clip(tmp_path / "a.mp4", duration=1).path
    info = probe(str(path), LIMITS)
    decoder = get_decoder("pyav", max_pixels=LIMITS.max_pixels, keep_bytes=1 << 30)
    decoder.thumbnails(str(path), info, np.arange(30), 64, 1, range(30))
    monkeypatch.setattr(pyav_module, "Reader", lambda *_, **__: pytest.fail("decoded again"))
    out = np.zeros((2, 180, 320, 3), np.uint8)
    done = decoder.decode(str(path), info, np.array([3, 29]), None, out, 1)
    assert done.tolist() == [0, 1]
