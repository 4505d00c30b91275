"""Records of videos: what another server decoded is taken by its record, within the same limits."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.adapters.media.media_records import MediaRecords
from vllm_mm_ext.adapters.runtime import Runtime
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.errors import MediaTooLongError
from vllm_mm_ext.fleet.output_store import OutputStore
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.fetch.file_source import _RACY_NS
from vllm_mm_ext.media.recorded import (
    DELIVERED,
    MediaRecord,
    RecordedSegment,
    RecordedSound,
    RecordError,
    limits_key,
    pack,
    unpack,
)
from vllm_mm_ext.media.results import VideoResult
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.testing.media import Tone, make_clip

PLAN = VideoPlan(
    SamplingSpec(max_frames=8),
    SizeRule(kind="fixed", height=56, width=84),
    audio=True,
    reduction=Reduction(pool=2),
)
SEGMENTS = [
    RecordedSegment("sound", None, {"video": b"item"}),
    RecordedSegment(None, b"12345678", {}),
]


class Job:
    """What an encoder was asked."""

    def __init__(self, *, is_open: bool = False, takes: bool = True) -> None:
        self.name: str | None = "job"
        self.is_open = is_open
        self.takes_records = takes
        self.used_records = 0
        self.whole: Any = None

    def begin(self, levels: Any, item_tokens: int) -> None: ...

    def end(self) -> None: ...


def runtime(**decode: Any) -> Runtime:
    media = {"media": {"decode": {"workers": 1, **decode}}}
    traits = ModelTraits(hears_video=True, audio_rate=16_000)
    return Runtime(MMExtConfig.from_additional_config({"mm_ext": media}), traits)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_clip(
        tmp_path_factory.mktemp("clips") / "a.mp4", duration=4, audio=[Tone(440.0, 0.0, 4.0)]
    )
    time.sleep(_RACY_NS / 1e9 + 0.1)
    return made.path


@pytest.fixture(scope="module")
def encoder() -> Iterator[Runtime]:
    made = runtime()
    yield made
    made.close()


@pytest.fixture
def engine() -> Iterator[Runtime]:
    made = runtime()
    yield made
    made.close()


async def resolve(one: Runtime, path: Path) -> MediaRef:
    return await one.fetcher(path.parent, ()).resolve(path.as_uri(), timeout_s=5)


async def decoded(one: Runtime, path: Path) -> VideoResult:
    return await one.frontend.video(await resolve(one, path), PLAN)


def records(root: Path, wait_s: float = 5.0) -> MediaRecords:
    return MediaRecords(OutputStore(root, 1 << 20), "plan", "limits", wait_s)


def record_bytes(result: VideoResult) -> bytes:
    return pack(MediaRecord.of(result.frames, SEGMENTS))


async def test_a_recorded_video_is_the_decoded_one_without_pixels(
    encoder: Runtime, engine: Runtime, clip: Path, tmp_path: Path
) -> None:
    whole = await decoded(encoder, clip)
    records(tmp_path).write(str(whole.frames.digest), record_bytes(whole))
    ref, job, read = await resolve(engine, clip), Job(), records(tmp_path)
    found = await read.video(job, engine.frontend, ref, PLAN)
    assert found is not None
    frames, theirs = found.frames, whole.frames
    for name in ("digest", "times", "step", "reduction", "pinned", "shape"):
        assert getattr(frames, name) == getattr(theirs, name), name
    assert frames.frame_digests() == theirs.frame_digests()
    assert frames.strides[:3] == (0, 0, 0)
    assert frames.audio is not None
    assert theirs.audio is not None
    assert (frames.audio.digest, len(frames.audio)) == (theirs.audio.digest, len(theirs.audio))
    assert found.info == whole.info
    np.testing.assert_array_equal(found.selection.indices, whole.selection.indices)
    assert (job.used_records, read.counts["recorded"]) == (1, 1)
    assert engine.stats()["decode"]["jobs"] == 0


def test_a_store_that_was_cleaned_away_costs_no_more_than_its_records(tmp_path: Path) -> None:
    written = records(root := tmp_path / "store")
    shutil.rmtree(root)
    root.write_text("no directory")
    written.write("one", b"record")
    root.unlink()
    written.write("one", b"record")
    assert written.read("one") == b"record"


async def test_an_encoder_s_record_is_waited_for_as_long_as_it_is_at_work(
    encoder: Runtime, engine: Runtime, clip: Path, tmp_path: Path
) -> None:
    whole, ref = await decoded(encoder, clip), await resolve(engine, clip)
    read, job = records(tmp_path, wait_s=60.0), Job(is_open=True)
    waits = asyncio.create_task(read.video(job, engine.frontend, ref, PLAN))
    await asyncio.sleep(0.1)
    assert not waits.done()
    records(tmp_path).write(str(whole.frames.digest), record_bytes(whole))
    assert await waits is not None
    # One that ends without a record, or writes none for long, is not waited for any more.
    other = replace(PLAN, sampling=SamplingSpec(max_frames=4))
    waits = asyncio.create_task(read.video(job, engine.frontend, ref, other))
    await asyncio.sleep(0.1)
    job.is_open = False
    assert await waits is None
    read = records(tmp_path, wait_s=0.1)
    assert await read.video(Job(is_open=True), engine.frontend, ref, other) is None
    assert read.counts == {"recorded": 0, "decoded": 1, "decoded_later": 0}


async def test_a_video_that_this_server_refuses_has_no_record_here(
    encoder: Runtime, clip: Path, tmp_path: Path
) -> None:
    whole = await decoded(encoder, clip)
    records(tmp_path).write(str(whole.frames.digest), record_bytes(whole))
    strict = runtime(max_duration_s=1.0)
    try:
        ref = await resolve(strict, clip)
        read = records(tmp_path)
        assert await read.video(Job(), strict.frontend, ref, PLAN) is None
        with pytest.raises(MediaTooLongError):
            await strict.frontend.video(ref, PLAN)
    finally:
        strict.close()


async def test_what_is_here_already_and_what_may_not_be_kept_is_taken_by_no_record(
    encoder: Runtime, engine: Runtime, clip: Path, tmp_path: Path
) -> None:
    whole = await decoded(encoder, clip)
    records(tmp_path).write(str(whole.frames.digest), record_bytes(whole))
    ref, read = await resolve(engine, clip), records(tmp_path)
    part = replace(PLAN, sampling=replace(PLAN.sampling, span=(0.0, 2.0)))
    assert await read.video(None, engine.frontend, ref, PLAN) is None
    assert await read.video(Job(takes=False), engine.frontend, ref, PLAN) is None
    assert await read.video(Job(), engine.frontend, ref, part) is None
    await engine.frontend.video(ref, PLAN)
    assert await read.video(Job(), engine.frontend, ref, PLAN) is None
    assert sum(read.counts.values()) == 0


async def test_a_record_that_was_lost_or_broken_is_written_again(
    encoder: Runtime, clip: Path, tmp_path: Path
) -> None:
    whole, wrote = await decoded(encoder, clip), records(tmp_path)
    digest = str(whole.frames.digest)
    wrote.write(digest, record_bytes(whole))
    (file,) = tmp_path.glob("??/*")
    file.unlink()
    assert wrote.read(digest) is None
    wrote.write(digest, record_bytes(whole))
    assert list(tmp_path.glob("??/*")) == [file]
    assert wrote.read(digest) == record_bytes(whole)
    file.write_bytes(file.read_bytes()[:-1])
    assert wrote.read(digest) is None
    wrote.write(digest, record_bytes(whole))
    assert wrote.read(digest) == record_bytes(whole)


async def test_an_encoder_that_is_late_is_waited_for_once(
    engine: Runtime, clip: Path, tmp_path: Path
) -> None:
    job, read = Job(is_open=True), records(tmp_path, wait_s=0.05)
    ref = await resolve(engine, clip)
    assert await read.video(job, engine.frontend, ref, PLAN) is None
    assert job.name is None
    done = Job()
    assert await read.video(done, engine.frontend, ref, PLAN) is None
    assert done.name == "job"


REQUEST = DecodeRequest(sampling=SamplingSpec(), audio="optional")
LIMITS: list[tuple[str, Any]] = [
    ("max_pixels", 1),
    ("max_duration_s", 1.0),
    ("max_audio_s", 1.0),
]


@pytest.fixture(scope="module")
def known(encoder: Runtime, clip: Path) -> MediaRecord:
    whole = encoder.run_blocking(decoded(encoder, clip))
    record = MediaRecord.of(whole.frames, SEGMENTS)
    of_request = msgspec.structs.replace(record.delivered, limits=limits_key(REQUEST.limits))
    return msgspec.structs.replace(record, delivered=of_request)


def test_a_record_is_held_against_the_limits_of_a_decode(known: MediaRecord) -> None:
    change = msgspec.structs.replace
    limits, none = REQUEST.limits, ()
    requests = [
        replace(REQUEST, limits=replace(limits, **{field: value})) for field, value in LIMITS
    ]
    requests += [
        replace(REQUEST, audio="none"),
        replace(REQUEST, sampling=None),
    ]
    for request in requests:
        with pytest.raises(RecordError):
            unpack(pack(known), request)
    # Limits that a record of other limits has must hold for what the record says, too.
    more: list[tuple[str, Any]] = [("max_frames", known.shape[0] - 1), ("max_output_bytes", 100)]
    for field, value in more:
        changed = replace(limits, **{field: value})
        of_others = change(known.delivered, limits=limits_key(changed))
        with pytest.raises(RecordError):
            unpack(pack(change(known, delivered=of_others)), replace(REQUEST, limits=changed))
    # How long a decode may take, and in how much memory, decides nothing else.
    unpack(pack(known), replace(REQUEST, limits=replace(limits, timeout_s=1.0, memory_bytes=1)))
    wrong: list[dict[str, Any]] = [
        {"shape": (*known.shape[:3], 4)},
        {"shape": (known.shape[0] + 1, *known.shape[1:])},
        {"frames": known.frames[1:]},
        {"sound": RecordedSound(1 << 40, 16_000, "x")},
        {"sound": RecordedSound(1, 16_000, "x" * 1000)},
    ]
    for fields in wrong:
        with pytest.raises(RecordError):
            unpack(pack(change(known, **fields)), REQUEST)
    assert unpack(pack(change(known, segments=none)), REQUEST).segments == none


@given(st.data())
@settings(max_examples=200)
def test_no_bytes_make_reading_fail_otherwise(known: MediaRecord, data: Any) -> None:
    whole = bytearray(pack(known))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for given_ in (bytes(whole), bytes(whole[:cut])):
        with suppress(RecordError):
            unpack(given_, REQUEST)


async def test_what_is_known_of_a_decode_holds_no_frames(encoder: Runtime, clip: Path) -> None:
    whole = await decoded(encoder, clip)
    assert whole.frames.memo[DELIVERED].info.packets is None
