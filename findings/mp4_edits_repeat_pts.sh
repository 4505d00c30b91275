#!/usr/bin/env bash
# Of an MP4 file with two edits, PyAV 18.1.0 delivers hidden packets that have the timestamps of shown ones.
#
# An edit list (ISO/IEC 14496-12, 8.6.6) names the stretches of a track that are shown, one behind the other, as a
# cutting program writes them that copies the coded pictures. FFmpeg's demuxer delivers for each stretch what it takes
# to decode it: the rest of the last group of pictures and the pictures from the key frame before the next stretch
# come too, marked AV_PKT_FLAG_DISCARD (PyAV: is_discard), and decode() leaves their pictures out. Their timestamps go
# on past the end of their stretch, into those of the next one. So a timestamp does not name a packet: a reader that
# finds the pictures it wants by the timestamps of packets takes a hidden packet for a shown one, and misses pictures.
#
# Seen: av 18.1.0 (libavformat 62.12.102), Python 3.11, Linux x86-64, H.264 with two B pictures, 25 pictures a second:
#     50 pictures are shown; of the hidden packets, 25 have a timestamp of a shown one
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy
cat >check.py <<'PYTHON'
import struct

import av
import numpy as np

FPS = 25
# Seconds shown, and the second of the track from which on: two in a row, and two that leave one out.
EDITS = [(1, 0.08), (1, 1.08)]
AROUND = {b"moov", b"trak", b"edts"}


def clip(path):
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"bf": "2", "g": "25", "x264-params": "scenecut=0"}
        for number in range(4 * FPS):
            picture = np.full((48, 64, 3), number * 2, np.uint8)
            picture[:, : number % 64] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def boxes(data):
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + size]
        at += size


def scales(data, found):
    """Ticks of a second, of the film and of the track."""
    for kind, body in boxes(data):
        if kind in (b"mvhd", b"mdhd"):
            found[kind] = struct.unpack_from(">I", body, 12)[0]
        elif kind in (b"moov", b"trak", b"mdia"):
            scales(body, found)
    return found


def edited(data, of):
    made = b""
    for kind, body in boxes(data):
        if kind == b"elst":
            entries = [(round(s * of[b"mvhd"]), round(at * of[b"mdhd"])) for s, at in EDITS]
            body = struct.pack(">II", 0, len(entries)) + b"".join(
                struct.pack(">IIHH", *entry, 1, 0) for entry in entries
            )
        elif kind in AROUND:
            body = edited(body, of)
        made += struct.pack(">I", len(body) + 8) + kind + body
    return made


clip("clip.mp4")
with open("clip.mp4", "rb") as file:
    whole = file.read()
kinds = [kind for kind, _ in boxes(whole)]
# The pictures stand before the boxes that grow, so they stay where they are.
assert kinds.index(b"mdat") < kinds.index(b"moov"), kinds
with open("film.mp4", "wb") as file:
    file.write(edited(whole, scales(whole, {})))

with av.open("film.mp4") as container:
    packets = [(p.pts, p.is_discard) for p in container.demux(video=0) if p.pts is not None]
with av.open("film.mp4") as container:
    pictures = sum(1 for _ in container.decode(video=0))
shown = {pts for pts, hidden in packets if not hidden}
twice = sum(1 for pts, hidden in packets if hidden and pts in shown)
print(f"{pictures} pictures are shown; of the hidden packets, {twice} have a timestamp of a shown one")
assert pictures == len(shown) == 50, (pictures, len(shown))
assert twice == 25, twice
PYTHON
venv/bin/python check.py
