#!/usr/bin/env bash
# PyAV 18.1.0: writing AV1 with libsvtav1 as root leaves the thread under a real-time scheduling policy.
#
# SVT-AV1 raises its own threads to SCHED_FIFO with priority 99 where it may, which is as root (the user in most
# containers), and the thread that opens the encoder with them. That thread keeps the policy after the encoder was
# closed, and processes that it starts inherit it: a script that makes AV1 clips, and then starts a server to measure
# it, measures a server that nothing else can interrupt. x264, x265 and the two encoders of libvpx leave the policy as
# it is. The thread can take it back with os.sched_setscheduler.
#
# Seen as root: av 18.1.0, Python 3.11, Linux x86-64:
#     libx264: policy 0, priority 0
#     libx265: policy 0, priority 0
#     libvpx-vp9: policy 0, priority 0
#     libsvtav1: policy 1, priority 99
#     a process started afterwards: policy 1
set -euo pipefail
if [ "$(id -u)" != 0 ]; then
    echo "only as root" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy
cat >check.py <<'PYTHON'
import os
import subprocess
import sys

import av
import numpy as np


def write(codec):
    with av.open("clip.mkv", "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(3):
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def seen():
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


assert seen() == (os.SCHED_OTHER, 0), "run this under the usual policy"
found = {}
for codec in ("libx264", "libx265", "libvpx-vp9", "libsvtav1"):
    write(codec)
    found[codec] = seen()
    print(f"{codec}: policy {found[codec][0]}, priority {found[codec][1]}")
ask = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
child = int(subprocess.run(ask, capture_output=True, check=True).stdout)
print(f"a process started afterwards: policy {child}")
last = found.pop("libsvtav1")
assert set(found.values()) == {(os.SCHED_OTHER, 0)}, found
assert (last, child) == ((os.SCHED_FIFO, 99), os.SCHED_FIFO), (last, child)
PYTHON
venv/bin/python check.py 2>errors || { cat errors >&2; exit 1; }
