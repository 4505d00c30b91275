#!/usr/bin/env bash
# PyAV 18.1.0 and OpenCV 5.0.0 show columns that an H.264 stream cuts off at the left; OpenCV squeezes them in.
#
# A stream may say that columns of its pictures are not shown (the cropping rectangle of its parameter set).
# Unless the decoder has the flag `unaligned`, FFmpeg rounds the number at the left down, to a multiple of 64
# for 8-bit 4:2:0, so that lines begin where memory is convenient; the number at the right is kept. PyAV's frame
# is then wider than the width of its own codec context. OpenCV scales that frame to the width of the context:
# the picture has the right size, and is squeezed beside what should be hidden. Nothing is raised or logged. The
# `ffmpeg` program of version 7.1 and later shows it right. The clips are 160 wide, dark in the columns that are
# cut off and bright elsewhere; with 64 columns all are right.
#
# Seen: av 18.1.0 (libavcodec 62.28.102), opencv-python-headless 5.0.0.93, Python 3.11, Linux x86-64:
#     20 cut off: width 140; PyAV 160 wide, 20 dark; unaligned 140 wide, 0 dark; OpenCV 140 wide, 17 dark
#     40 cut off: width 120; PyAV 160 wide, 40 dark; unaligned 120 wide, 0 dark; OpenCV 120 wide, 30 dark
#     64 cut off: width 96; PyAV 96 wide, 0 dark; unaligned 96 wide, 0 dark; OpenCV 96 wide, 0 dark
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check av==18.1.0 opencv-python-headless==5.0.0.93 numpy
cat >check.py <<'PYTHON'
import av
import cv2
import numpy as np
from av.codec.context import Flags


def write(path, left):
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.options = {"x264-params": f"crop-rect={left},0,0,0:log-level=none", "crf": "1"}
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        picture = np.full((96, 160, 3), 200, np.uint8)
        picture[:, :left] = 20
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))


def with_pyav(path, unaligned):
    with av.open(path) as container:
        context = container.streams.video[0].codec_context
        if unaligned:
            context.flags |= Flags.unaligned
        frame = next(container.decode(video=0))
        return context.width, measured(frame.to_ndarray(format="rgb24"))


def measured(picture):
    return picture.shape[1], int((picture[48, :, 0] < 110).sum())


for left in (20, 40, 64):
    path = f"{left}.mp4"
    write(path, left)
    width, shown = with_pyav(path, unaligned=False)
    _, unaligned = with_pyav(path, unaligned=True)
    _, picture = cv2.VideoCapture(path, cv2.CAP_FFMPEG).read()
    opencv = measured(picture)
    print(
        f"{left} cut off: width {width}; PyAV {shown[0]} wide, {shown[1]} dark; "
        f"unaligned {unaligned[0]} wide, {unaligned[1]} dark; "
        f"OpenCV {opencv[0]} wide, {opencv[1]} dark"
    )
    assert width == 160 - left
    assert unaligned == (width, 0)
    assert shown == ((160, left) if left < 64 else (width, 0)), shown
    assert opencv[0] == width
    assert abs(opencv[1] - (left * width / 160 if left < 64 else 0)) <= 2, opencv
PYTHON
venv/bin/python check.py
