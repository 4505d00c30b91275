"""The rules and constants of the scheduler that ``scheduler --ablate`` changes, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

from vllm_mm_ext.adapters.scheduler import admission, prompts, queue
from vllm_mm_ext.policies.scheduler import step_plan, step_times

# Constants, and what each is set to: without it where that can be, less, and more.
_CONSTANTS: tuple[tuple[str, Any, str, tuple[float, ...]], ...] = (
    ("least share of prompts", step_plan, "LEAST_SHARE", (0.01, 0.1, 0.4)),
    ("share of aging_s after which a request is aged", prompts, "AGED_AFTER", (0.25, 1.0)),
    ("text before aged media", step_plan, "TEXT_SHARE", (0.0, 0.25, 1.0)),
    ("half-life of prices", step_times, "HALF_LIFE_TOKENS", (2048, 8192)),
    ("weight of the newest step", step_times, "_NEWEST", (0.05, 0.2)),
    ("most of what is expected", step_times, "_MOST_OF_EXPECTED", (1e9, 1.5, 4.0)),
    ("looked at", queue, "LOOKED_AT", (4, 16)),
    ("steps of going last", admission, "BACK_OFF", (0, 4, 16)),
    ("seconds that a look stands", prompts, "_FRESH_S", (0.0, 0.125, 0.5)),
)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(owner, name, value):
        yield


@contextmanager
def _candidates(**changes: Any) -> Iterator[None]:
    """Candidates that are read with some values changed."""
    make = step_plan.Candidate
    with mock.patch.object(prompts, "Candidate", lambda *args: make(*args)._replace(**changes)):
        yield


@contextmanager
def _room(**changes: Any) -> Iterator[None]:
    """Steps whose room is another."""
    from vllm_mm_ext.adapters.scheduler import mm_scheduler

    def room(*args: Any, **given: Any) -> step_plan.Room:
        return step_plan.Room(*args, **{**given, **changes})

    with mock.patch.object(mm_scheduler, "Room", room):
        yield


def _exact_work_decides() -> AbstractContextManager[Any]:
    coarse = step_plan.Candidate.rank.fget  # type: ignore[attr-defined]

    def rank(one: step_plan.Candidate) -> step_plan.Rank:
        place, priority, _, order = coarse(one)
        return place, priority, one.work if place == 1 else 0, order

    return mock.patch.object(step_plan.Candidate, "rank", property(rank))


def _nothing_closes() -> AbstractContextManager[None]:
    give = step_plan._Giver.give

    def reopened(self: Any, *args: Any) -> None:
        self._closed = False
        give(self, *args)

    return _set(step_plan._Giver, "give", reopened)


RULES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    **{
        f"{name} {value:g}": partial(_set, owner, attribute, value)
        for name, owner, attribute, values in _CONSTANTS
        for value in values
    },
    "the exact work decides": _exact_work_decides,
    "no going last": partial(_candidates, last=False),
    "no slots for text": partial(_room, reserved=0),
    "no slots kept for aged": partial(_room, most_kept=0),
    "no making up for large items": partial(_room, late_s=0.0),
    "no single item to learn from": partial(_set, step_times.StepTimes, "knows_encoder", True),
    "items slip past those without room": _nothing_closes,
    "target whatever the spread": partial(_set, step_times.StepTimes, "encoder_spread", 0.0),
}
