"""Notes in a request's trace, and in the metrics where there are any, what its stages took."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm_mm_ext.adapters.sight.recorder import Recorder
from vllm_mm_ext.media.use_media import MediaUse
from vllm_mm_ext.request.media_items import MediaItem
from vllm_mm_ext.request.stage_times import StageTime, item_stages
from vllm_mm_ext.request.trace import RequestTrace


def note_probe(
    trace: RequestTrace, recorder: Recorder | None, url: str, probed: MediaUse[Any]
) -> None:
    """Note that a video was fetched and probed for planning.

    Args:
        trace: Of the request.
        recorder: Of the API server, if it has one.
        url: Of the video; uses of one URL are probed once.
        probed: What came of it.
    """
    item = next(item for item in trace.media if item.url == url)
    work = {"probe": probed.use_s}
    _note_item(trace, recorder, item, probed, work)


def note_use(
    trace: RequestTrace,
    recorder: Recorder | None,
    item: MediaItem,
    used: MediaUse[Any],
    planned: bool,
) -> None:
    """Note that a media item was fetched and decoded.

    Args:
        trace: Of the request.
        recorder: Of the API server, if it has one.
        item: The item, with its report.
        used: What came of it, with the ``stages`` of its result.
        planned: Planning had fetched and probed it.
    """
    work = dict(used.result.stages)
    if planned:
        work.pop("probe", None)
    _note_item(trace, recorder, item, used, work, fetched=not planned)


def note_download(
    trace: RequestTrace, recorder: Recorder | None, modality: str, seconds: float, num_bytes: int
) -> None:
    """Note that media that vLLM itself decodes was just downloaded.

    Args:
        trace: Of the request.
        recorder: Of the API server, if it has one.
        modality: Of the media.
        seconds: What it took.
        num_bytes: Encoded size.
    """
    _note(trace, recorder, [StageTime("fetch", time.time() - seconds, seconds, modality)])
    if recorder is not None:
        recorder.downloaded(modality, num_bytes)


def note_plan(trace: RequestTrace, recorder: Recorder | None, seconds: float) -> None:
    """Note that a plan was just made in so many seconds."""
    _note(trace, recorder, [StageTime("plan", time.time() - seconds, seconds)])


def note_preprocessing(trace: RequestTrace, recorder: Recorder | None, seconds: float) -> None:
    """Note that the model inputs of a request with media were just made in so many seconds."""
    if trace.items:
        _note(trace, recorder, [StageTime("preprocess", time.time() - seconds, seconds)])
        if recorder is not None:
            recorder.rendered(trace)


def _note_item(
    trace: RequestTrace,
    recorder: Recorder | None,
    item: MediaItem,
    used: MediaUse[Any],
    work: dict[str, float],
    *,
    fetched: bool = True,
) -> None:
    placed = item_stages(work, fetch_s=used.fetch_s, use_s=used.use_s, ended=time.time())
    number = trace.media.index(item)
    _note(
        trace,
        recorder,
        (
            StageTime(stage, began, seconds, item.modality, number)
            for stage, began, seconds in placed
            if fetched or stage != "fetch"
        ),
    )


def _note(trace: RequestTrace, recorder: Recorder | None, times: Iterable[StageTime]) -> None:
    times = list(times)
    trace.timeline += times
    if recorder is not None:
        recorder.stages(times)
