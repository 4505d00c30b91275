"""What an in-process engine did in each step: encoder items, prefill and decode tokens.

    with record_steps(llm) as trace:
        llm.chat(...)
    trace.print(Console())

Works for stock vLLM and the plugin alike. The engine must run in this process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class EncodedItem:
    """An mm item that went through the encoder.

    Attributes:
        index: Its place among the request's items.
        modality: vLLM's name for what it is.
        embeddings: Tokens it became.
        offset: First token of its placeholder in the prompt.
    """

    index: int
    modality: str
    embeddings: int
    offset: int


@dataclass(frozen=True)
class RequestWork:
    """What one request got in one step.

    Attributes:
        request: Number of the request, in the order in which requests were first scheduled.
        encoded: Items encoded.
        computed: Tokens that were there before the step; in its first step they came from the
            prefix cache.
        prefill: Prompt tokens computed.
        decode: Other tokens computed.
    """

    request: int
    encoded: tuple[EncodedItem, ...]
    computed: int
    prefill: int
    decode: int

    def overlaps(self) -> bool:
        """Whether tokens before those that were encoded, or part of them, were prefilled."""
        return bool(self.encoded) and self.prefill > 0


@dataclass(frozen=True)
class Step:
    """One engine step.

    Attributes:
        started_s: Seconds since recording began.
        work: What each scheduled request got.
        finished: Numbers of the requests that ended since the step before.
    """

    started_s: float
    work: tuple[RequestWork, ...]
    finished: tuple[int, ...]


@dataclass
class StepTrace:
    """Steps in order."""

    steps: list[Step] = field(default_factory=list)

    def work(self, request: int | None = None) -> list[RequestWork]:
        """What one request got, step by step; of all requests without a number."""
        return [
            work
            for step in self.steps
            for work in step.work
            if request is None or work.request == request
        ]

    def encoded(self, request: int | None = None) -> list[EncodedItem]:
        """Items that were encoded for one request, or for all."""
        return [item for work in self.work(request) for item in work.encoded]

    def cached_tokens(self, request: int) -> int:
        """Leading prompt tokens of a request that the prefix cache held."""
        return self.work(request)[0].computed

    def requests(self) -> list[int]:
        """Numbers of the requests that were scheduled."""
        return sorted({work.request for work in self.work()})

    def overlapping_steps(self) -> int:
        """Steps that both encoded items and prefilled tokens while more of them followed.

        The last step that encodes for a request has nothing left to overlap with.
        """
        count = 0
        for number in self.requests():
            encoding = [work for work in self.work(number) if work.encoded]
            count += sum(work.overlaps() for work in encoding[:-1])
        return count

    def to_json(self) -> str:
        """The steps as a JSON list."""
        return json.dumps([dataclasses.asdict(step) for step in self.steps], indent=1)

    def table(self) -> Table:
        """One line per request and step, with bars whose length is the share of the largest."""
        table = Table(title="engine steps", title_justify="left", box=None)
        for column in ("step", "ms", "request", "encoder items", "embeddings", "prefill", "decode"):
            table.add_column(column, justify="left" if column == "encoder items" else "right")
        table.add_column("encode / prefill")
        widest = max((_embeddings(w) + w.prefill for w in self.work()), default=0) or 1
        for number, step in enumerate(self.steps):
            for place, work in enumerate(step.work):
                first = place == 0
                encoded, bar = _embeddings(work), 40 / widest
                table.add_row(
                    str(number) if first else "",
                    f"{1e3 * step.started_s:.0f}" if first else "",
                    str(work.request),
                    _ranges([item.index for item in work.encoded]),
                    str(encoded or ""),
                    str(work.prefill or ""),
                    str(work.decode or ""),
                    "[magenta]" + "█" * round(encoded * bar) + "[/]"
                    "[cyan]" + "░" * round(work.prefill * bar) + "[/]",
                )
        return table

    def print(self, console: Console) -> None:
        """Print the table."""
        console.print(self.table())


@contextmanager
def record_steps(llm: Any) -> Iterator[StepTrace]:
    """Record the steps an engine makes while the block runs.

    Args:
        llm: A ``vllm.LLM`` whose engine runs in this process.

    Raises:
        ValueError: The engine runs in a process of its own.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    scheduler = getattr(core, "scheduler", None)
    if scheduler is None:
        raise ValueError("the engine is not in this process: set VLLM_ENABLE_V1_MULTIPROCESSING=0")
    trace = StepTrace()
    numbers: dict[str, int] = {}
    began = time.perf_counter()
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter() - began
        output = original(*args, **kwargs)
        if output.total_num_scheduled_tokens or output.finished_req_ids:
            trace.steps.append(_step(started, output, scheduler.requests, numbers))
        return output

    scheduler.schedule = schedule
    try:
        yield trace
    finally:
        # Uncovers the class's own method.
        del scheduler.schedule


def _step(started: float, output: Any, requests: Any, numbers: dict[str, int]) -> Step:
    cached = output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    work = []
    for name, tokens in output.num_scheduled_tokens.items():
        request = requests[name]
        prompt_left = max(0, request.num_prompt_tokens - computed[name])
        prefill = min(tokens, prompt_left)
        encoded = tuple(
            _item(index, request.mm_features[index])
            for index in output.scheduled_encoder_inputs.get(name, ())
        )
        number = numbers.setdefault(name, len(numbers))
        work.append(RequestWork(number, encoded, computed[name], prefill, tokens - prefill))
    ended = sorted(numbers[name] for name in output.finished_req_ids if name in numbers)
    return Step(started, tuple(work), tuple(ended))


def _item(index: int, feature: Any) -> EncodedItem:
    place = feature.mm_position
    return EncodedItem(index, feature.modality, place.get_num_embeds(), place.offset)


def _embeddings(work: RequestWork) -> int:
    return sum(item.embeddings for item in work.encoded)


def _ranges(indices: list[int]) -> str:
    """``0-3, 6``: consecutive numbers as ranges."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
