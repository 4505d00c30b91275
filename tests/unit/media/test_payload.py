"""Frames that carry their origin: what is shared, remembered and dropped."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
from blake3 import blake3

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.payload import SampledFrames, Waveform

POOLED = Reduction(pool=2)


def frames(**options: Any) -> SampledFrames:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), np.uint8)
    sound = Waveform(np.zeros(16, np.float32), digest="sound", rate=16_000)
    defaults = {"digest": "d", "times": (0.0, 0.5, 1.0, 1.5), "audio": sound, "step": 0.5}
    return SampledFrames(pixels, **{**defaults, "pinned": True, **options})


def test_frame_digests_are_of_each_frames_bytes_and_made_once() -> None:
    made = frames()
    assert made.frame_digests() == tuple(blake3(f.tobytes()).digest() for f in np.asarray(made))
    assert made.frame_digests() is made.frame_digests()
    flipped = SampledFrames(np.asarray(made)[:, ::-1], digest="e")
    assert flipped.frame_digests()[0] == blake3(np.asarray(made)[0, ::-1].tobytes()).digest()


def test_another_reduction_shares_pixels_and_memo_but_not_the_digest() -> None:
    made = frames()
    pooled = made.reduced(POOLED)
    assert np.shares_memory(pooled, made)
    assert pooled.frame_digests() is made.frame_digests()
    assert pooled.memo is made.memo
    assert pooled.digest not in (made.digest, made.reduced(Reduction(pool=3)).digest)
    assert made.reduced(POOLED).digest == pooled.digest
    assert (pooled.reduction, pooled.pinned, pooled.step) == (POOLED, True, 0.5)
    assert (pooled.times, pooled.audio) == (made.times, made.audio)
    assert made.reduced(NO_REDUCTION) is made


def test_views_drop_what_holds_for_the_whole() -> None:
    made = frames(reduction=POOLED)
    made.memo["key"] = "value"
    part = made[:2]
    assert (part.digest, part.times, part.step, part.pinned) == (None, None, None, False)
    assert (part.memo, part.reduction) == ({}, NO_REDUCTION)


def test_pickling_keeps_the_origin_and_leaves_the_memo() -> None:
    made = frames(reduction=POOLED)
    made.memo["key"] = "value"
    for other in (pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert np.array_equal(other, made)
    loaded = pickle.loads(pickle.dumps(made))
    assert (loaded.digest, loaded.step, loaded.reduction, loaded.pinned) == ("d", 0.5, POOLED, True)
    assert loaded.memo == {}
    assert loaded.frame_digests() == made.frame_digests()
