"""When each stage of a request began and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

# Of a media item, in this order. ``wait`` is for a decode worker, for bytes of the media budget,
# and for the rest of a decode that another request had begun.
ITEM_STAGES: Final = (
    "fetch",
    "probe",
    "wait",
    "sample",
    "decode",
    "audio",
    "resample",
)
# Of a whole request, in this order. ``queue`` ends when the engine first takes the request up;
# from there to the first token, each moment is in ``encode``, ``prefill`` or ``prefill_wait``.
REQUEST_STAGES: Final = ("plan", "preprocess", "queue", "encode", "prefill_wait", "prefill")
STAGES: Final = ITEM_STAGES + REQUEST_STAGES


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of a request.

    Attributes:
        stage: One of ``STAGES``.
        began: When it began, in seconds since the epoch.
        seconds: How long it took.
        modality: Modality of the item; empty for a stage of the whole request.
        item: Index of the item in the request's media; None for a stage of the whole request.
    """

    stage: str
    began: float
    seconds: float
    modality: str = ""
    item: int | None = None


# What a decode worker calls its stages.
_OF_WORKER: Final = {"profile": "sample"}
# Frames and sound of a video are decoded beside each other.
_SIDE_BY_SIDE: Final = ("decode", "audio")


def item_stages(
    work: Mapping[str, float], *, fetch_s: float, use_s: float, ended: float
) -> list[tuple[str, float, float]]:
    """Place the stages of a media item in time.

    Decode workers tell how long each stage took. A result is delivered as soon as its last stage
    ends, so the stages are placed backwards from there; a probe comes first, before anything waits.

    Args:
        work: Seconds per stage; empty where nothing was done.
        fetch_s: Seconds until the content was known.
        use_s: Seconds from there to the result.
        ended: When the result was there, in seconds since the epoch.

    Returns:
        ``(stage, began, seconds)`` of the stages that the item went through.
    """
    took = {_OF_WORKER.get(stage, stage): seconds for stage, seconds in work.items()}
    begun = ended - use_s
    placed = [("fetch", begun - fetch_s, fetch_s)]
    if "probe" in took:
        placed.append(("probe", begun, took["probe"]))
    steps = (("sample",), _SIDE_BY_SIDE, ("resample",))
    lengths = [max(took.get(stage, 0.0) for stage in step) for step in steps]
    first = ended - sum(lengths)
    # Of work that another request had begun, only the end was waited for.
    waited = use_s - took.get("probe", 0.0) - sum(lengths)
    if took and waited > 0:
        placed.append(("wait", first - waited, waited))
    for step, length in zip(steps, lengths, strict=True):
        placed += [(stage, first, took[stage]) for stage in step if stage in took]
        first += length
    return placed
