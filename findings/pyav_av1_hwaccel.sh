#!/usr/bin/env bash
# PyAV 18.1.0 never decodes AV1 on a GPU through HWAccel, though its wheel's FFmpeg has an AV1 decoder that can.
#
# A stream is opened with the decoder that FFmpeg lists first for its format. For AV1 that is libdav1d, which
# has no hardware configuration; FFmpeg's own decoder `av1`, which has one for CUDA, is never asked. With
# HWAccel("cuda") and the default allow_software_fallback=True the CPU decodes the file without a word, on
# machines with a GPU too; with False the file is refused as if no decoder could do it. H.264, HEVC and VP9
# are opened with decoders that have the configuration. A codec context made by name does ask for the GPU:
# av.CodecContext.create("av1", "r", hwaccel=...). The check needs no GPU.
#
# Seen: av 18.1.0 (libavcodec 62.28.102), Python 3.11, Linux x86-64:
#     decoders with a CUDA configuration: av1 h264 hevc vp9; without: libdav1d
#     fallback allowed: libdav1d, is_hwaccel False
#     fallback refused: RuntimeError: Hardware accelerated decode requested but no stream is compatible
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy
cat >check.py <<'PYTHON'
from fractions import Fraction

import av
import numpy as np
from av.codec import Codec
from av.codec.hwaccel import HWAccel


def on_cuda(decoder):
    return any(c.device_type.name == "cuda" for c in Codec(decoder, "r").hardware_configs)


with_cuda = [name for name in ("av1", "h264", "hevc", "vp9", "libdav1d") if on_cuda(name)]
print("decoders with a CUDA configuration:", *with_cuda)
assert with_cuda == ["av1", "h264", "hevc", "vp9"], with_cuda

with av.open("clip.mp4", "w") as container:
    stream = container.add_stream("libsvtav1", rate=25)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    for number in range(5):
        frame = av.VideoFrame.from_ndarray(np.full((96, 64), 100, np.uint8), format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, 25)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))

with av.open("clip.mp4", hwaccel=HWAccel("cuda")) as container:
    context = container.streams.video[0].codec_context
    next(container.decode(video=0))
    print("fallback allowed:", context.codec.name, "is_hwaccel", context.is_hwaccel)
    assert (context.codec.name, context.is_hwaccel) == ("libdav1d", False)

try:
    with av.open("clip.mp4", hwaccel=HWAccel("cuda", allow_software_fallback=False)) as container:
        next(container.decode(video=0))
except RuntimeError as error:
    print("fallback refused:", error)
    assert "no stream is compatible" in str(error)
else:
    raise AssertionError("the file was opened")
PYTHON
SVT_LOG=1 venv/bin/python check.py
