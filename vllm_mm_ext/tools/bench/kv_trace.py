"""Traces of KV accesses: which blocks and mm items requests use, recorded from an engine.

A trace is a text file. Blocks and items are numbered in the order in which they were first seen, so
that it tells what is the same, and nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_mm_ext

TRACES = Path(vllm_mm_ext.__file__).parent / "assets" / "kv"
_HEAD = """\
# KV accesses for `vllm-mm bench kv-replay`, {what}.
# `> request session prompt+output tokens, blocks, items`: a request begins; `< request`: it ends.
# An item is its number, where its placeholder begins and how long it is, and `a` if it is sound.
block {block}
hidden {hidden}
"""


@dataclass(frozen=True, slots=True)
class Item:
    """An mm item in a prompt.

    Attributes:
        content: Number of the content.
        offset: First token of its placeholder.
        length: Tokens of the placeholder.
        modality: As vLLM names it.
    """

    content: int
    offset: int
    length: int
    modality: str = "video"


@dataclass(frozen=True, slots=True)
class Access:
    """A request.

    Attributes:
        session: Its conversation, if its client named one.
        prompt: Tokens of its prompt.
        output: Tokens of its answer.
        blocks: Numbers of its full blocks, prompt and answer.
        items: Its mm items, in prompt order.
    """

    session: str | None
    prompt: int
    output: int
    blocks: tuple[int, ...]
    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class KVTrace:
    """Requests of an engine, and when they began and ended.

    Attributes:
        block: Tokens of a block.
        hidden: Hidden size of the language model.
        accesses: The requests, in the order in which they began.
        events: The request's index, and whether it begins; in order.
    """

    block: int
    hidden: int
    accesses: tuple[Access, ...]
    events: tuple[tuple[int, bool], ...]

    def write(self, file: Path, what: str) -> None:
        """Write a text file.

        Args:
            file: The file.
            what: What the traffic is, for whoever reads it.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.text(what))

    def text(self, what: str) -> str:
        """The trace as ``write`` writes it."""
        lines = []
        for number, begins in self.events:
            if not begins:
                lines.append(f"< {number}")
                continue
            one = self.accesses[number]
            items = " ".join(
                f"{item.content}@{item.offset}+{item.length}"
                + ("a" if item.modality == "audio" else "")
                for item in one.items
            )
            lines.append(
                f"> {number} {one.session or '-'} {one.prompt}+{one.output} "
                f"{_ranges(one.blocks) or '-'} {items}".rstrip()
            )
        head = _HEAD.format(what=what, block=self.block, hidden=self.hidden)
        return head + "\n".join(lines) + "\n"

    @classmethod
    def read(cls, file: Path) -> KVTrace:
        """Read what ``write`` wrote.

        Raises:
            ValueError: It is no such file; the message names the line.
        """
        return cls.parse(file.read_text(), str(file))

    @classmethod
    def parse(cls, text: str, name: str) -> KVTrace:
        """Read what ``text`` made.

        Args:
            text: The trace.
            name: What errors call it.

        Raises:
            ValueError: It is none; the message names the line.
        """
        shape: dict[str, int] = {}
        accesses: dict[int, Access] = {}
        events = []
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            try:
                if words[0] in ("block", "hidden"):
                    shape[words[0]] = int(words[1])
                    continue
                kind, request = words[0], int(words[1])
                if kind == ">":
                    if request != len(accesses):
                        raise ValueError("requests are numbered from 0 on")
                    accesses[request] = _access(words[2:])
                elif kind != "<" or request not in accesses:
                    raise ValueError("an end of a request that has not begun")
                events.append((request, kind == ">"))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{name}, line {number}: {line!r} ({error})") from None
        if missing := {"block", "hidden"} - shape.keys():
            raise ValueError(f"{name}: no line tells {' and '.join(sorted(missing))}")
        return cls(shape["block"], shape["hidden"], tuple(accesses.values()), tuple(events))


def _access(words: list[str]) -> Access:
    session, tokens, blocks = words[:3]
    prompt, output = map(int, tokens.split("+"))
    items = []
    for word in words[3:]:
        modality = "audio" if word.endswith("a") else "video"
        content, place = word.removesuffix("a").split("@")
        offset, length = map(int, place.split("+"))
        items.append(Item(int(content), offset, length, modality))
    return Access(
        None if session == "-" else session, prompt, output, _numbers(blocks), tuple(items)
    )


def _ranges(numbers: tuple[int, ...]) -> str:
    """``0-3,6``: consecutive numbers as ranges."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _numbers(ranges: str) -> tuple[int, ...]:
    if ranges == "-":
        return ()
    found: list[int] = []
    for span in ranges.split(","):
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


class Recorder:
    """What requests of an engine use, for a trace.

    Args:
        block: Tokens of a block.
        hidden: Hidden size of the language model.
    """

    def __init__(self, block: int, hidden: int) -> None:
        self._shape = block, hidden
        self._blocks: dict[bytes, int] = {}
        self._items: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        self._accesses: list[Access] = []
        self._events: list[tuple[int, bool]] = []

    def begin(self, request: Any) -> None:
        """A request gets its first blocks."""
        if request.request_id not in self._begun:
            self._begun[request.request_id] = len(self._accesses)
            self._events.append((len(self._accesses), True))
            self._accesses.append(Access(None, 0, 0, ()))

    def end(self, request: Any) -> None:
        """A request lets go of its blocks; a preempted one begins anew later."""
        number = self._begun.pop(request.request_id, None)
        if number is None:
            return
        self._events.append((number, False))
        prompt = request.num_prompt_tokens
        self._accesses[number] = Access(
            request.session_id,
            prompt,
            request.num_tokens - prompt,
            # Numbered at the end: by then the answer is known.
            tuple(self._blocks.setdefault(h, len(self._blocks)) for h in request.block_hashes),
            tuple(
                Item(
                    self._items.setdefault(feature.identifier, len(self._items)),
                    feature.mm_position.offset,
                    feature.mm_position.length,
                    feature.modality,
                )
                for feature in request.mm_features
            ),
        )

    def trace(self) -> KVTrace:
        """All requests that have ended."""
        open_ = set(self._begun.values())
        kept = [number for number in range(len(self._accesses)) if number not in open_]
        renamed = {number: new for new, number in enumerate(kept)}
        return KVTrace(
            *self._shape,
            tuple(self._accesses[number] for number in kept),
            tuple((renamed[n], begins) for n, begins in self._events if n in renamed),
        )


@contextmanager
def record_accesses(llm: Any) -> Iterator[Recorder]:
    """Record what requests use in an engine's KV cache while the block runs.

    Args:
        llm: A ``vllm.LLM`` whose engine runs in this process.
    """
    core = llm.llm_engine.engine_core.engine_core
    manager = core.scheduler.kv_cache_manager
    config = llm.llm_engine.model_config
    recorder = Recorder(manager.block_pool.hash_block_size, config.get_hidden_size())
    allocate, free = manager.allocate_slots, manager.free

    def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
        made = allocate(request, *args, **kwargs)
        if made is not None:
            recorder.begin(request)
        return made

    def freed(request: Any) -> None:
        recorder.end(request)
        free(request)

    manager.allocate_slots, manager.free = allocate_slots, freed
    try:
        yield recorder
    finally:
        # Uncovers the class's own methods.
        del manager.allocate_slots, manager.free
