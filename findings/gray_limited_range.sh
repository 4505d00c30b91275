#!/usr/bin/env bash
# PyAV 18.1.0 and OpenCV 5.0.0 show gray video of limited range too flat: black as 16, white as 235.
#
# A camera without colour may record HEVC of luma alone (4:0:0). Such a stream says, as one with colour does,
# whether its luma goes from 16 to 235 or from 0 to 255. FFmpeg's decoder passes the tag on with the frame
# (`color_range` 1), and swscale, which makes RGB of the frame, does not look at it: all gray formats count as full
# range. The same luma beside empty colour planes is expanded. Nothing is raised or logged. The clips have four
# bars of luma, and their streams are tagged as limited range.
#
# Seen: av 18.1.0 (libswscale 9.5.102), opencv-python-headless 5.0.0.93, Python 3.11, Linux x86-64:
#     libx265 gray: range 1, luma 16 64 126 235: PyAV 16 64 126 235, OpenCV 16 64 126 235
#     libx265 yuv420p: range 1, luma 16 64 126 235: PyAV 0 55 128 255, OpenCV 0 55 128 255
#     ffv1 gray: range 1, luma 16 64 126 235: PyAV 16 64 126 235, OpenCV 16 64 126 235
#     ffv1 yuv420p: range 1, luma 16 64 126 235: PyAV 0 55 128 255, OpenCV 0 55 128 255
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

LUMA = (16, 64, 126, 235)
BAR, LIMITED = 64, 1


def write(path, codec, pix_fmt):
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = BAR * len(LUMA), 64, pix_fmt
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none:range=limited", "crf": "0"}
        stream.codec_context.color_range = LIMITED
        for _ in range(3):
            frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
            frame.color_range = LIMITED
            for number, plane in enumerate(frame.planes):
                lines = np.full((plane.height, plane.line_size), 128, np.uint8)
                if number == 0:
                    lines[:, : stream.width] = np.repeat(np.array(LUMA, np.uint8), BAR)
                plane.update(lines)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def greens(picture):
    return [int(picture[32, BAR // 2 + BAR * bar, 1]) for bar in range(len(LUMA))]


for codec in ("libx265", "ffv1"):
    for pix_fmt in ("gray", "yuv420p"):
        path = f"{codec}-{pix_fmt}.mkv"
        write(path, codec, pix_fmt)
        with av.open(path) as container:
            frame = next(container.decode(video=0))
            tag, pyav = int(frame.color_range), greens(frame.to_ndarray(format="rgb24"))
        _, picture = cv2.VideoCapture(path, cv2.CAP_FFMPEG).read()
        opencv = greens(picture)
        print(f"{codec} {pix_fmt}: range {tag}, luma", *LUMA, end=": ")
        print("PyAV", *pyav, end=", ")
        print("OpenCV", *opencv)
        assert tag == LIMITED
        right = [0, 56, 128, 255]
        expected = list(LUMA) if pix_fmt == "gray" else right
        assert all(abs(a - b) <= 2 for a, b in zip(pyav, expected, strict=True)), pyav
        assert all(abs(a - b) <= 2 for a, b in zip(opencv, expected, strict=True)), opencv
PYTHON
venv/bin/python check.py
