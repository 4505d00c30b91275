#!/usr/bin/env bash
# Of two Ogg files joined to one, PyAV 18.1.0 tells the length of the second and decodes both; soundfile 0.13.1
# tells and reads the first alone.
#
# Ogg files may be joined by putting one behind the other (RFC 3533, "chained"); internet radio sends such streams,
# one chain for each title. FFmpeg takes the end of the last chain, less the beginning of its stream, for the length
# of the whole; its demuxer goes on through all chains. libsndfile, which librosa reads Ogg by and vLLM 0.32's audio
# loader tries before PyAV, stops at the end of the first. Nothing is raised. A length that is checked or planned for
# is so another one than that of the samples, in either direction, and a model hears the first title alone.
#
# Seen: av 18.1.0 (libavformat 62.12.102), soundfile 0.13.1 (libsndfile 1.2.2), Python 3.11, Linux x86-64:
#     2 s and 3 s: PyAV tells 3.0 s, decodes 5.0 s; soundfile tells 2.0 s, reads 2.0 s
#     3 s and 2 s: PyAV tells 2.0 s, decodes 5.0 s; soundfile tells 3.0 s, reads 3.0 s
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check av==18.1.0 soundfile==0.13.1 numpy
cat >check.py <<'PYTHON'
import av
import numpy as np
import soundfile

RATE = 48_000


def opus(path, seconds):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(seconds * RATE) / RATE)
    with av.open(path, "w") as container:
        stream = container.add_stream("libopus", rate=RATE, layout="mono")
        whole = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], format="fltp", layout="mono")
        whole.sample_rate = RATE
        resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=RATE)
        for frame in resampler.resample(whole):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open(path, "rb") as file:
        return file.read()


for first, second in ((2, 3), (3, 2)):
    with open("joined.ogg", "wb") as file:
        file.write(opus("a.ogg", first) + opus("b.ogg", second))
    with av.open("joined.ogg") as container:
        told = container.duration / av.time_base
        decoded = sum(frame.samples for frame in container.decode(audio=0)) / RATE
    info = soundfile.info("joined.ogg")
    samples, rate = soundfile.read("joined.ogg")
    print(
        f"{first} s and {second} s: PyAV tells {told:.1f} s, decodes {decoded:.1f} s; "
        f"soundfile tells {info.duration:.1f} s, reads {len(samples) / rate:.1f} s"
    )
    assert abs(told - second) < 0.1, told
    assert abs(decoded - first - second) < 0.1, decoded
    assert abs(info.duration - first) < 0.1 and abs(len(samples) / rate - first) < 0.1
PYTHON
venv/bin/python check.py
