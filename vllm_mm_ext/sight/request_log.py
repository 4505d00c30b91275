"""The latest requests with media, as the operator's page shows them. Pure."""

from __future__ import annotations

import base64
import heapq
import json
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vllm_mm_ext.request.media_items import AudioReport, MediaItem, VideoReport
from vllm_mm_ext.request.trace import RequestTrace

# Rows of the table of requests at a time: servers make, send and read them on their event loops.
MAX_ROWS = 200
# Of all records of a log together, with their pictures.
MAX_BYTES = 64 << 20
# What a record lists at most: media, times of frames, stages, windows of a long video.
_MAX_MEDIA, _MAX_TIMES, _MAX_STAGES, _MAX_WINDOWS = 64, 512, 1024, 256
_MAX_URL = 400
# Keys of a record that the table of requests shows.
_SUMMARY = ("id", "path", "began", "seconds", "status", "refused", "tokens", "cached_tokens")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it came.

    Attributes:
        id: Number of the request among those of its API server.
        path: Of the route.
        began: Seconds since the epoch.
    """

    id: str
    path: str
    began: float


@dataclass(frozen=True, slots=True)
class _Entry:
    id: str
    body: bytes
    summary: dict[str, Any]
    files: frozenset[str]


class RequestLog:
    """The records of finished requests, the latest ones, bounded in number and bytes.

    Args:
        max_records: Records kept.
        max_bytes: Bytes of all records.
    """

    def __init__(self, max_records: int, max_bytes: int = MAX_BYTES) -> None:
        self._entries: deque[_Entry] = deque()
        self._max_records = max_records
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record of ``record_of``."""
        self._append(record)
        while self._entries and (
            len(self._entries) > self._max_records or self.num_bytes > self._max_bytes
        ):
            self.num_bytes -= len(self._entries.popleft().body)

    def summaries(self, before: float = math.inf) -> list[dict[str, Any]]:
        """Rows of the table, ``MAX_ROWS`` at most: see ``latest``."""
        return latest((entry.summary for entry in reversed(self._entries)), before)

    def record(self, request_id: str) -> dict[str, Any] | None:
        """A whole record; None if it is not there any more."""
        for entry in self._entries:
            if entry.id == request_id:
                found: dict[str, Any] = json.loads(entry.body)
                return found
        return None

    def forget(self, digests: Collection[str], urls: Collection[str] = ()) -> None:
        """Take what is known of files out of the records; the records themselves stay.

        Args:
            digests: Of the files.
            urls: Of the files, for media whose digest a request never knew. Media of URLs that
                differ in what ``shown_url`` leaves out are forgotten as well.
        """
        files = {*digests, *(shown_url(url) for url in urls if not _is_data(url))}
        entries, self._entries = self._entries, deque()
        self.num_bytes = 0
        for entry in entries:
            if entry.files.isdisjoint(files):
                self._entries.append(entry)
                self.num_bytes += len(entry.body)
                continue
            record = json.loads(entry.body)
            record.pop("windows", None)
            record["media"] = [
                {"modality": medium["modality"], "taken_down": True}
                if _file_of(medium) in files
                else medium
                for medium in record["media"]
            ]
            self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        body = json.dumps(record, separators=(",", ":")).encode()
        self._entries.append(
            _Entry(
                record["id"],
                body,
                summary_of(record),
                frozenset(map(_file_of, record["media"])),
            )
        )
        self.num_bytes += len(body)


def _file_of(medium: Mapping[str, Any]) -> str:
    """What tells the file of a medium of a record: its digest, or its URL."""
    return str(medium.get("digest") or medium.get("url", ""))


def latest(rows: Iterable[dict[str, Any]], before: float = math.inf) -> list[dict[str, Any]]:
    """Those ``MAX_ROWS`` of some rows whose requests ended last, the latest first.

    Args:
        rows: Of the table of requests.
        before: Seconds since the epoch; rows of requests that ended later are left out.
    """
    return heapq.nlargest(MAX_ROWS, (row for row in rows if _ended(row) <= before), key=_ended)


def _ended(row: Mapping[str, Any]) -> float:
    # The page computes the same number of a row.
    return float(row["began"] + row["seconds"])


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    """The row of a record: all but what grows with the media."""
    spans: dict[str, list[float]] = {}
    for stage, began, seconds, *_ in record["timeline"]:
        # From the first to the last item that is in the stage.
        span = spans.setdefault(stage, [began, began + seconds])
        span[:] = min(span[0], began), max(span[1], began + seconds)
    return {key: record[key] for key in _SUMMARY} | {
        "media": [
            {"modality": medium["modality"], "name": medium.get("url", "")[-60:]}
            for medium in record["media"][:4]
        ],
        "more_media": max(0, len(record["media"]) - 4),
        "lowered": any(medium.get("lowered") for medium in record["media"]),
        "stages": {stage: [round(t, 4) for t in span] for stage, span in spans.items()},
    }


def record_of(arrival: Arrival, trace: RequestTrace, seconds: float, status: int) -> dict[str, Any]:
    """What is kept of a request, as plain JSON values.

    Args:
        arrival: Of the request.
        trace: What was done for the request.
        seconds: From the first byte to the last one of the answer.
        status: HTTP status; 0 where there was no answer.
    """
    images = [
        {
            "modality": "image",
            "url": shown_url(image.url),
            "digest": image.digest,
            "size": [image.height, image.width] if image.width else None,
        }
        for image in trace.images[:_MAX_MEDIA]
    ]
    media = [_medium(item) for item in trace.media[:_MAX_MEDIA]]
    used = {item.url for item in trace.media}
    held = [
        {"modality": "video", "url": shown_url(url), "digest": digest or None}
        for url, digest in islice(trace.held.items(), _MAX_MEDIA)
        if url not in used
    ]
    record: dict[str, Any] = {
        "id": arrival.id,
        "path": arrival.path,
        "began": round(arrival.began, 3),
        "seconds": round(seconds, 4),
        "status": status,
        "refused": trace.refused,
        "request_id": trace.request_id,
        "tokens": dict(trace.tokens),
        "cached_tokens": trace.cached_tokens,
        "media": media + held + images,
        "items": _items(trace),
        "timeline": [
            [
                time.stage,
                round(time.began - arrival.began, 4),
                round(time.seconds, 4),
                time.modality,
                time.item,
            ]
            for time in trace.timeline[:_MAX_STAGES]
        ],
    }
    if trace.long_video is not None:
        block = trace.long_video.block()
        record["strategy"] = block.get("strategy")
        # A takedown finds the notes about the videos that are listed.
        windows = [one for one in block.get("windows", []) if one["video"] < _MAX_MEDIA]
        record["windows"] = windows[:_MAX_WINDOWS]
    return record


def _medium(item: MediaItem) -> dict[str, Any]:
    made: dict[str, Any] = {
        "modality": item.modality,
        "url": shown_url(item.url),
        "digest": item.known_digest,
        "level": item.decision.level,
        "lowered": [dict(lowered) for lowered in item.decision.lowered],
    }
    report = item.report
    if isinstance(report, AudioReport):
        made |= {"source_s": round(report.seconds, 2), "decoded_cache": report.cached}
    elif isinstance(report, VideoReport):
        made |= {
            "policy": report.policy,
            "frames": report.frames,
            "times": [round(float(time), 3) for time in report.times[:_MAX_TIMES]],
            "size": [report.height, report.width],
            "source_s": None if report.duration_s is None else round(report.duration_s, 3),
            "audio_s": None if report.audio_s is None else round(report.audio_s, 2),
            "audio_note": report.audio_note,
            "reduction": report.reduction.model_dump(),
            "decoded_cache": report.cached,
        }
        if item.pictures is not None and item.pictures.done() and not item.pictures.exception():
            made["pictures"] = [base64.b64encode(one).decode() for one in item.pictures.result()]
    return made


def _items(trace: RequestTrace) -> dict[str, dict[str, int]]:
    """By modality, numbers of mm items, of those whose inputs and of those whose KV was cached."""
    counts: dict[str, dict[str, int]] = {}
    for item in trace.items:
        of = counts.setdefault(item.modality, {"items": 0, "processor": 0, "prefix": 0})
        of["items"] += 1
        of["processor"] += item.preprocessed
        of["prefix"] += item.end <= (trace.cached_tokens or 0)
    return counts


def shown_url(url: str) -> str:
    """A URL as it is shown: no password, no query (it may hold a token), no media in itself.

    Args:
        url: As the request names it.
    """
    if _is_data(url):
        return url[:80].partition(",")[0] + ",..."
    scheme, found, rest = url.partition("://")
    if found:
        host, slash, path = rest.partition("?")[0].partition("/")
        url = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    url = url if len(url) <= _MAX_URL else f"{url[:_MAX_URL]}..."
    # Text from JSON may have half of a surrogate pair, which plain UTF-8 cannot encode.
    return url.encode("utf-8", "replace").decode()


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"
