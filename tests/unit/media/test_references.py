"""Pictures that no wanted one refers to are left out, and the wanted ones stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.packet import Packet
from av.video.stream import VideoStream

from vllm_mm_ext.media.decode.decoders import get_decoder
from vllm_mm_ext.media.decode.decoders.reader import Reader, _frames_of
from vllm_mm_ext.media.decode.left_out import (
    FFmpegReferences,
    LeftOut,
    LostReferencesError,
    needed_pictures,
)
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.decode.references import Picture, References
from vllm_mm_ext.media.types import DecodeLimits

WIDTH, HEIGHT, COUNT = 128, 96, 70


def encode(path: Path, parameters: str) -> Path:
    """A clip with texture that moves, so that pictures refer to different ones."""
    rng = np.random.default_rng(5)
    texture = np.kron(rng.integers(0, 256, (48, 64)), np.ones((4, 4))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "medium", "crf": "28", "x264-params": parameters}
        stream = container.add_stream("libx264", rate=25, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(COUNT):
            planes = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
            moved = np.roll(texture, (-number, -2 * number), (0, 1))[:HEIGHT, :WIDTH]
            planes[:HEIGHT] = moved // 2 + (64 if number % 20 < 10 else 0)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def packets_of(path: Path) -> tuple[list[Packet[Any]], bytes]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        return packets, stream.codec_context.extradata or b""


def marks_of(path: Path, wanted: Sequence[bool]) -> list[bool]:
    packets, extradata = packets_of(path)
    references = References(extradata)
    pictures = [
        references.read(memoryview(packet), wanted=mark)
        for packet, mark in zip(packets, wanted, strict=True)
    ]
    return [given for given, _ in needed_pictures(pictures, wanted, references.held)]


def decode(path: Path, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    info = probe(str(path), DecodeLimits())
    out = np.zeros((len(rows), HEIGHT, WIDTH, 3), np.uint8)
    decoder = get_decoder("pyav", max_pixels=10**7)
    assert len(decoder.decode(str(path), info, rows, None, out, 1)) == len(rows)
    return out


# What x264 may do with references: few and many, weighted and reordered ones, several slices.
ENCODINGS = [
    "ref=1:bframes=3:b-pyramid=normal:weightp=1",
    "ref=5:bframes=8:b-pyramid=normal:weightp=2:b-adapt=0",
    "ref=2:bframes=5:b-pyramid=strict:b-adapt=0:direct=temporal",
    "ref=1:bframes=3:b-pyramid=normal:b-adapt=0:slices=3:cabac=0",
    "ref=3:bframes=4:b-pyramid=normal:open-gop=1:keyint=20",
    "ref=2:bframes=3:b-pyramid=normal:intra-refresh=1:keyint=20",
    "ref=2:bframes=3:b-pyramid=normal:interlaced=1",
]


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
@pytest.mark.parametrize("parameters", ENCODINGS)
def test_frames_are_those_of_a_decoder_that_leaves_nothing_out(
    tmp_path: Path, parameters: str, suffix: str
) -> None:
    path = encode(tmp_path / f"a.{suffix}", parameters)
    everything = decode(path, np.arange(COUNT))
    for step in (1, 3, 7, 11):
        rows = np.arange(step - 1, COUNT, step)
        np.testing.assert_array_equal(decode(path, rows), everything[rows])


def test_b_pictures_that_nothing_wanted_refers_to_are_left_out(tmp_path: Path) -> None:
    fixed = "ref=1:bframes=3:b-pyramid=normal:weightp=0:b-adapt=0:scenecut=0"
    path = encode(tmp_path / "a.mp4", fixed)
    assert sum(marks_of(path, [False] * COUNT)) <= COUNT / 4 + 4
    # Of four pictures, the first level of the pyramid is wanted beside the P picture.
    packets, _ = packets_of(path)
    wanted = [packet.pts in {p.pts for p in packets[2::4]} for packet in packets]
    marks = marks_of(path, wanted)
    assert all(mark for mark, want in zip(marks, wanted, strict=True) if want)


def test_a_picture_whose_references_would_change_is_noticed(tmp_path: Path) -> None:
    packets, extradata = packets_of(encode(tmp_path / "a.mp4", ENCODINGS[1]))
    references = References(extradata)
    pictures = [references.read(memoryview(packet), wanted=True) for packet in packets]
    known = [picture for picture in pictures if picture is not None]
    assert len(known) == len(pictures)

    def follow(*, every_b: bool) -> None:
        decoder = FFmpegReferences()
        for picture in known:
            decoder.follow(picture, given=every_b or not picture.is_b, right=True)

    follow(every_b=True)
    with pytest.raises(LostReferencesError):
        follow(every_b=False)


def test_what_is_not_understood_needs_everything_before_it() -> None:
    pictures = [Picture(0, True), Picture(1, True), None, Picture(3, True)]
    marks = needed_pictures(pictures, [False] * 4, frozenset())
    assert [given for given, _ in marks] == [True, True, True, False]


def test_damaged_packets_are_left_to_the_decoder(tmp_path: Path) -> None:
    packets, extradata = packets_of(encode(tmp_path / "a.mp4", ENCODINGS[0]))
    rng = np.random.default_rng(1)
    references = References(extradata)
    for packet in packets:
        broken = bytearray(memoryview(packet))
        for place in rng.integers(0, len(broken), 6):
            broken[place] = rng.integers(0, 256)
        references.read(memoryview(bytes(broken)), wanted=True)
    for headers in (b"", b"\1\2\3", extradata[:20], b"\0\0\1\x67"):
        assert References(headers).read(memoryview(b"\0\0\0\1\x65"), wanted=True) is None


def bits_of(*codes: int | str) -> bytes:
    """A unit: Exp-Golomb codes of the numbers, and the bits of the texts, after its first byte."""
    text = "".join(
        code if isinstance(code, str) else f"{code + 1:0{2 * (code + 1).bit_length() - 1}b}"
        for code in codes
    )
    text += "1" + "0" * (-(len(text) + 1) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def parameter_sets(num_refs: int) -> bytes:
    """Of the baseline profile, with frame numbers and places of four bits."""
    sps = bits_of("01000010" + "0" * 16, 0, 0, 0, 0, num_refs, "0", 0, 0, "1")
    pps = bits_of(0, 0, "00", 0, 0, 0, "000", 0, 0, 0, "000")
    return b"\0\0\1\x67" + sps + b"\0\0\1\x68" + pps


@pytest.mark.parametrize("num_refs", [1, 4, 1 << 31])
@pytest.mark.parametrize("marking", ["0", "11"])
def test_no_stream_makes_more_references_than_the_standard_allows(
    num_refs: int, marking: str
) -> None:
    references = References(parameter_sets(num_refs))
    idr = b"\0\0\1\x65" + bits_of(0, 7, 0, "0000", 0, "0000", "00")
    known = references.read(memoryview(idr), wanted=True) is not None
    assert known == (num_refs <= 16)
    for number in range(1, 40):
        # A P picture that others refer to; with "11" it tells to let go of none.
        header = bits_of(0, 5, 0, f"{number % 16:04b}", f"{number % 8 * 2:04b}", "00", marking)
        picture = references.read(memoryview(b"\0\0\1\x41" + header + b"\x80" * 8), wanted=True)
        assert len(references.held) <= 16
        assert (picture is not None) == (known and (marking == "0" or number < num_refs))


def test_headers_are_read_with_the_parameter_sets_that_hold_from_a_packet_on(
    tmp_path: Path,
) -> None:
    # A live recording that was taken up again, with other settings.
    one, other = (encode(tmp_path / f"{k}.flv", ENCODINGS[k]) for k in (0, 1))
    (tmp_path / "joined.flv").write_bytes(one.read_bytes() + other.read_bytes()[13:])
    joined, extradata = packets_of(tmp_path / "joined.flv")
    assert len(joined) == 2 * COUNT
    given: list[Packet[Any]] = []

    class Counter(Reader):
        def __init__(self) -> None: ...

        def decode(self, packet: Packet[Any] | None, **_: bool) -> list[av.VideoFrame]:
            given.extend([] if packet is None else [packet])
            return []

    def count(packets: Sequence[Packet[Any]], extradata: bytes) -> int:
        given.clear()
        marked = ((packet, number == 0) for number, packet in enumerate(packets))
        list(_frames_of(Counter(), marked, LeftOut(References(extradata))))
        return len(given)

    assert count(joined[COUNT:], extradata) == count(*packets_of(other)) < COUNT
