"""Time on the one thread that preprocesses media in an API server, per request."""

from __future__ import annotations

import shutil

from vllm_mm_ext.testing.media import Tone, make_audio
from vllm_mm_ext.tools.bench.bench_clips import other_pictures
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.inprocess import measure
from vllm_mm_ext.tools.bench.preprocessing_engine import FAMILIES, TURNS

_SIDES = ("stock", "plugin")
AUDIO_S = 10.0


def run(context: BenchContext) -> BenchResult:
    """30 s of silent 720p video, 30 frames, three turns; ten seconds of audio for the omni model.

    One engine of each side and family, one after the other. Both sides make 30 frames of each
    video; stock delivers them at native size, the plugin at the model's.
    """
    found = {}
    with context.scratch() as media, context.steps("preprocessing", 3) as begin:
        begin("clips")
        for number in range(context.repeats + 1):
            clip = other_pictures(context.work_dir, number, width=1280, height=720, duration=30.0)
            shutil.copy(clip, media / f"{number}.mp4")
            tone = Tone(300.0 + 50 * number, 0.0, AUDIO_S)
            make_audio(media / f"{number}.wav", duration=AUDIO_S, tones=[tone], sample_rate=16000)
        for side in _SIDES:
            begin(side)
            found[side] = measure("preprocessing_engine", side, [str(media)])
    rows = []
    for family in FAMILIES:
        for turn in range(1, TURNS + 1):
            rows.append(_row(found, family, f"turn {turn}", f"{family}, video, turn {turn}"))
    rows.append(_row(found, "qwen2_5_omni", "audio", f"qwen2_5_omni, {AUDIO_S:.0f} s of audio"))
    notes = [
        "30 s of 1280x720, 30 frames; from the call of the processor to its return: splitting, "
        "hashing, HF preprocessing, prompt",
        "the engine's turn is over before the next begins, so the thread competes with nothing",
    ]
    return BenchResult("preprocessing", rows, notes)


def _row(
    found: dict[str, dict[str, dict[str, list[float]]]], family: str, key: str, name: str
) -> Row:
    runs = {side: [1e3 * s for s in found[side][family][key]] for side in _SIDES}
    return Row.of(name, "ms", **runs)
