#!/usr/bin/env bash
# decord2 3.4.0 serves another picture, as if it were the one asked for, in files of more than 10,000
# packets where the keyframe is far from the frame.
#
# The clip is plain H.264 in MP4, 25 fps, one keyframe, no B frames; each picture carries its own number.
# Of 9,900 frames every one that is asked for comes back. Of 24,000 frames, frame 20,000 comes back as one
# of the first few hundred or thousand. Nothing is raised: get_batch returns an array of the right shape, and
# the only trace is a line on standard error ("Failed to skip frames effectively ... Decoder did not respond
# after 10000 attempts"). Which early picture it is differs from run to run. PyAV decodes the same file right.
#
# Seen: decord2 3.4.0, av 18.1.0, Python 3.11, Linux x86-64:
#     9900 frames: asked 9890, decord gave 9890
#     24000 frames: asked 20000, decord gave 598; PyAV gave 20000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check av==18.1.0 decord2==3.4.0 numpy
cat >check.py <<'EOF'
from fractions import Fraction

import av
import numpy as np


def picture(number):
    """The number in 16 squares of 8x8, black or white."""
    bits = np.array([number >> k & 1 for k in range(16)], np.uint8).reshape(4, 4)
    luma = np.kron(np.where(bits, 235, 16).astype(np.uint8), np.ones((8, 8), np.uint8))
    return np.concatenate([luma, np.full((16, 32), 128, np.uint8)])


def number_of(rgb):
    gray = rgb.astype(float).mean(axis=2)
    squares = gray.reshape(4, 8, 4, 8)[:, 2:6, :, 2:6].mean(axis=(1, 3)).ravel()
    return sum(int(square > 128) << k for k, square in enumerate(squares))


def write(path, count):
    with av.open(path, "w") as container:
        stream = container.add_stream(
            "libx264", rate=25, options={"preset": "ultrafast", "crf": "18", "bf": "0"}
        )
        stream.width = stream.height = 32
        stream.pix_fmt, stream.gop_size = "yuv420p", count
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def by_decord(path, wanted):
    import decord

    return number_of(decord.VideoReader(path).get_batch([wanted]).asnumpy()[0])


def by_pyav(path, wanted):
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == wanted:
                return number_of(frame.to_ndarray(format="rgb24"))


write("short.mp4", 9_900)
write("long.mp4", 24_000)
short, long, right = (
    by_decord("short.mp4", 9_890),
    by_decord("long.mp4", 20_000),
    by_pyav("long.mp4", 20_000),
)
print(f"9900 frames: asked 9890, decord gave {short}")
print(f"24000 frames: asked 20000, decord gave {long}; PyAV gave {right}")
assert short == 9_890
assert right == 20_000
assert long < 15_000, "decord gives the right frame now"
EOF
venv/bin/python check.py 2>errors
grep -m 1 -o "Failed to skip frames effectively" errors
