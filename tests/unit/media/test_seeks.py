"""The reader finds the keyframe it wants, whatever a seek does, and reads little besides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vllm_mm_ext.media.decode.decoders import get_decoder, read_plan
from vllm_mm_ext.media.decode.decoders import pyav_decoder as pyav_module
from vllm_mm_ext.media.decode.decoders.reader import Reader, SeekMissError
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits
from vllm_mm_ext.testing.media import make_clip, read_stamp

LIMITS = DecodeLimits()
KINDS = {
    "ts": {"name": "a.ts", "codec": "libx264", "bframes": 3},
    "ts-late-start": {"name": "a.ts", "codec": "libx264", "start_time": 7.0},
    "ts-open-gop": {"name": "a.ts", "codec": "libx264", "bframes": 3, "open_gop": True},
    "ts-mpeg2": {"name": "a.ts", "codec": "mpeg2video", "bframes": 2},
    "mp4": {"name": "a.mp4", "codec": "libx264", "bframes": 2},
    "mkv": {"name": "a.mkv", "codec": "libx264", "bframes": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def clip(request, tmp_path_factory):
    kind = {"gop": 15, "duration": 5, "stamp": True} | KINDS[request.param]
    return make_clip(tmp_path_factory.mktemp("clip") / kind.pop("name"), **kind).path


@pytest.fixture
def count(monkeypatch):
    """Calls of the reader's methods; every gap is crossed by a seek."""
    monkeypatch.setattr(read_plan, "SEEK_OVER_PACKETS", 3)
    monkeypatch.setattr(pyav_module, "read_in_order", lambda *_: pytest.fail("from the start"))
    calls = {"read": 0, "decode": 0}
    for name in calls:
        plain = getattr(Reader, name)

        def counted(*args, name=name, plain=plain, **options):
            calls[name] += 1
            return plain(*args, **options)

        monkeypatch.setattr(Reader, name, counted)
    return calls


def stamps_of(path, info, rows, threads=1):
    out = np.zeros((len(rows), info.video.height, info.video.width, 3), np.uint8)
    decoder = get_decoder("pyav", max_pixels=LIMITS.max_pixels)
    done = decoder.decode(str(path), info, np.array(rows), None, out, threads)
    assert done.tolist() == list(range(len(rows)))
    return [read_stamp(frame) for frame in out]


@pytest.mark.usefixtures("count")
@pytest.mark.parametrize("threads", [1, 3])
def test_seeks_lead_to_the_right_frames(clip, threads):
    rows = [1, 50, 61, 100, 149]
    assert stamps_of(clip, probe(str(clip), LIMITS), rows, threads) == rows


def test_a_far_frame_costs_its_gop_alone(clip, count):
    info = probe(str(clip), LIMITS)
    count.update(read=0, decode=0)
    assert stamps_of(clip, info, [1, 140]) == [1, 140]
    # Of 150 packets.
    assert count["read"] < 70
    assert count["decode"] < 40


def test_a_file_that_cannot_seek_is_read_up_to_the_keyframe(clip, count, monkeypatch):
    def miss(*_):
        raise SeekMissError

    monkeypatch.setattr(Reader, "seek", miss)
    info = probe(str(clip), LIMITS)
    count.update(read=0, decode=0)
    assert stamps_of(clip, info, [1, 140]) == [1, 140]
    assert count["decode"] < 40


def test_packets_without_a_row_are_decoded_with_the_picture_before_them(clip):
    # As the second fields of field-coded video, which have a packet but are no picture.
    info = probe(str(clip), LIMITS)
    table = info.packets
    keep = (np.arange(len(table)) % 2 == 0) | table.is_key
    columns = ("pts", "time", "size", "is_key", "order")
    fewer = replace(table, **{name: getattr(table, name)[keep] for name in columns})
    last = len(fewer) - 1
    shown = np.flatnonzero(keep)
    rows = [3, 20, last]
    assert stamps_of(clip, replace(info, packets=fewer), rows) == shown[rows].tolist()


def test_a_keyframe_that_does_not_decode_costs_a_decode_from_the_one_before(tmp_path, count):
    path = make_clip(tmp_path / "a.ts", codec="mpeg2video", gop=15, duration=5, stamp=True).path
    info = probe(str(path), LIMITS)
    lie = info.packets.is_key.copy()
    lie[[100, 140]] = True
    info = replace(info, packets=replace(info.packets, is_key=lie))
    count.update(read=0, decode=0)
    assert stamps_of(path, info, [1, 101, 145]) == [1, 101, 145]
    assert count["decode"] < 75
