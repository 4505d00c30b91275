"""What any pool could save on a trace of KV accesses: the optimum, and informed policies.

Both see what the real pools see: blocks of which each is found only if all before it are, and
requests whose own blocks take room while they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from vllm_mm_ext.policies.eviction.reuse import ReuseModel
from vllm_mm_ext.tools.bench.kv_costs import Costs
from vllm_mm_ext.tools.bench.kv_trace import Access, KVTrace


@dataclass(slots=True, eq=False)
class Run:
    """Blocks that all requests of a trace use together, or not at all.

    Attributes:
        parent: The run before it.
        blocks: Its blocks.
        uses: When it is used: indices of requests.
        children: Runs after it.
    """

    parent: Run | None
    blocks: list[int]
    uses: list[int]
    children: list[Run] = field(default_factory=list)


class Runs:
    """The runs of a trace.

    Args:
        trace: The trace.
        longest: Blocks of a run at most: what can be kept of it in part.
    """

    def __init__(self, trace: KVTrace, longest: int = 8) -> None:
        uses: dict[int, list[int]] = {}
        before: dict[int, int | None] = {}
        for number, access in enumerate(trace.accesses):
            last = None
            for block in access.blocks:
                uses.setdefault(block, []).append(number)
                before[block] = last
                last = block
        self._of: dict[int, Run] = {}
        for access in trace.accesses:
            for block in access.blocks:
                if block in self._of:
                    continue
                above = before[block]
                parent = self._of[above] if above is not None else None
                if (
                    parent is not None
                    and parent.blocks[-1] == above
                    and uses[above or 0] == uses[block]
                    and len(parent.blocks) < longest
                    and not parent.children
                ):
                    parent.blocks.append(block)
                    self._of[block] = parent
                    continue
                run = Run(parent, [block], uses[block])
                if parent is not None:
                    parent.children.append(run)
                self._of[block] = run

    def path(self, access: Access) -> list[Run]:
        """The runs of a request's blocks, in order."""
        return [run for run, _ in groupby(self._of[block] for block in access.blocks)]


def working_set(trace: KVTrace) -> int:
    """Most blocks that have been used, and will be used again, at any time."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, access in enumerate(trace.accesses):
        for block in access.blocks:
            first.setdefault(block, number)
            last[block] = number
    change = [0] * (len(trace.accesses) + 1)
    for block, begin in first.items():
        change[begin] += 1
        change[last[block] + 1] -= 1
    most = held = 0
    for each in change:
        held += each
        most = max(most, held)
    return most


def least_blocks(trace: KVTrace) -> int:
    """Blocks that the requests which run at the same time need at most."""
    size, most = trace.block, 0
    running: dict[int, tuple[set[int], int]] = {}
    for number, begins in trace.events:
        if not begins:
            del running[number]
            continue
        access = trace.accesses[number]
        # Not full, so no other request uses it.
        own = -(-(access.prompt + access.output) // size) - len(access.blocks)
        running[number] = set(access.blocks), own
        shared = set().union(*(blocks for blocks, _ in running.values()))
        most = max(most, len(shared) + sum(own for _, own in running.values()))
    return most


def optimum(trace: KVTrace, costs: Costs, blocks: int) -> float:
    """The most that any pool, knowing the whole trace, could save: an upper bound.

    Keeping a run of blocks from one use to the next saves its cost and takes its room in between.
    The best choice of whole intervals is relaxed to fractions, a linear program (Berger et al.,
    "Practical Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS 2018). A run cannot
    be found without the run before it.

    Args:
        trace: The trace.
        costs: What blocks save.
        blocks: Size of the pool.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    runs = Runs(trace)
    gains: list[float] = []
    # Of each interval, the index of the request that begins it and of the one that ends it.
    spans: list[tuple[int, int, int]] = []
    interval: dict[tuple[int, Run], int] = {}
    needs: list[tuple[int, int]] = []
    last: dict[Run, int] = {}
    own = []
    for number, access in enumerate(trace.accesses):
        place = 0
        own.append(-(-(access.prompt + access.output) // trace.block))
        findable = (access.prompt - 1) // trace.block
        for run in runs.path(access):
            count = max(0, min(len(run.blocks), findable - place))
            if run in last and count:
                interval[number, run] = len(spans)
                if run.parent is not None and (number, run.parent) in interval:
                    needs.append((len(spans), interval[number, run.parent]))
                spans.append((last[run], number, len(run.blocks)))
                gains.append(sum(costs.of(access, place + i) for i in range(count)))
            place += len(run.blocks)
            last[run] = number
    if not spans:
        return 0.0
    rows, columns, values, room = [], [], [], []
    # While a request runs, what it uses is there in any case.
    steps = len(trace.accesses)
    for column, (start, end, size) in enumerate(spans):
        for step in range(start + 1, end):
            rows.append(step)
            columns.append(column)
            values.append(float(size))
    room = [max(0.0, float(blocks - own[step])) for step in range(steps)]
    for child, parent in needs:
        rows += [len(room), len(room)]
        columns += [child, parent]
        values += [1.0, -1.0]
        room.append(0.0)
    found = linprog(
        c=-np.array(gains),
        A_ub=coo_matrix((values, (rows, columns)), shape=(len(room), len(spans))).tocsr(),
        b_ub=np.array(room),
        bounds=(0.0, 1.0),
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"no optimum found: {found.message}")
    return -float(found.fun)


class Informed(Protocol):
    """Ranks runs of blocks by what is known of a trace but not of what comes next."""

    def use(self, run: Run, now: int, media: bool) -> None:
        """A request uses a run."""

    def rate(self, run: Run, now: int) -> float:
        """Expected reuses per time."""


class Latest:
    """LRU, or where ``keep_first`` is set, what came first stays: by the time of the last use."""

    def __init__(self, *, keep_first: bool) -> None:
        self._sign = -1 if keep_first else 1
        self._last: dict[Run, int] = {}

    def use(self, run: Run, now: int, media: bool) -> None:  # noqa: ARG002 - Informed
        self._last[run] = now

    def rate(self, run: Run, now: int) -> float:
        return float(2.0 ** (self._sign * (self._last[run] - now) / 50))


class Fitted:
    """Knows from the start how often, and after what times, runs of a trace come back.

    It knows neither which come back nor when: only the rates by kind (media or text), by turns and
    by time since the last use, as the plugin's policy would learn them from the whole trace.

    Args:
        model: The rates.
        turns: How often a run was used, or its conversation has had turns, at a time.
    """

    def __init__(self, model: ReuseModel, turns: Callable[[Run, int], int]) -> None:
        self._model = model
        self._turns = turns
        self._state: dict[Run, tuple[int, int, int]] = {}

    def use(self, run: Run, now: int, media: bool) -> None:
        self._state[run] = int(media), self._turns(run, now), now

    def rate(self, run: Run, now: int) -> float:
        media, turns, last = self._state[run]
        return self._model.density(media, turns, now - last)


def fitted(trace: KVTrace, runs: Runs) -> Fitted:
    """The policy that knows the rates of a trace."""
    model = ReuseModel((1.0, 1.0))
    turns: dict[tuple[Run, int], int] = {}
    final: dict[Run, tuple[int, int, int]] = {}
    followed: set[Run] = set()
    for number, access in enumerate(trace.accesses):
        place = 0
        above: Run | None = None
        for run in runs.path(access):
            kind = int(_is_media(access, place, trace.block))
            if run in final:
                _, count, before = final[run]
                model.end(kind, count, number - before, reused=True)
                turns[run, number] = count + 1
            elif above is not None and (above.uses[0] == number or above not in followed):
                turns[run, number] = turns[above, number]
            else:
                turns[run, number] = 1
            final[run] = kind, turns[run, number], number
            place += len(run.blocks)
            if above is not None:
                followed.add(above)
            above = run
    length = len(trace.accesses)
    model.learn([(kind, count, length - last) for kind, count, last in final.values()])
    return Fitted(model, lambda run, now: turns[run, now])


def _is_media(access: Access, place: int, block: int) -> bool:
    end = (place + 1) * block
    return any(item.offset < end <= item.offset + item.length for item in access.items)


def saved_by(policy: Informed, trace: KVTrace, runs: Runs, costs: Costs, blocks: int) -> float:
    """Cost that a pool saves which gives up first what a policy expects least of.

    Args:
        policy: A new policy; it is changed.
        trace: The trace.
        runs: Its runs.
        costs: What blocks save.
        blocks: Size of the pool.
    """
    cached: dict[Run, int] = {}
    density: dict[Run, float] = {}
    busy: dict[int, list[Run]] = {}
    using: dict[Run, int] = {}
    held = extra = 0
    saved = 0.0
    for number, begins in trace.events:
        access = trace.accesses[number]
        partial = -(-(access.prompt + access.output) // trace.block) - len(access.blocks)
        if not begins:
            extra -= partial
            for run in busy.pop(number):
                using[run] -= 1
            continue
        path = runs.path(access)
        findable = (access.prompt - 1) // trace.block
        place, hit = 0, True
        for run in path:
            there = cached.get(run, 0)
            if hit:
                count = max(0, min(there, findable - place))
                saved += sum(costs.of(access, place + i) for i in range(count))
                hit = there == len(run.blocks)
            density[run] = sum(costs.of(access, place + i) for i in range(len(run.blocks))) / len(
                run.blocks
            )
            held += len(run.blocks) - there
            cached[run] = len(run.blocks)
            using[run] = using.get(run, 0) + 1
            policy.use(run, number, _is_media(access, place, trace.block))
            place += len(run.blocks)
        busy[number] = path
        extra += partial
        while held + extra > blocks:
            leaves = [
                run
                for run in cached
                if not using.get(run) and not any(child in cached for child in run.children)
            ]
            if not leaves:
                break
            victim = min(leaves, key=lambda run: density[run] * policy.rate(run, number))
            gone = min(cached[victim], held + extra - blocks)
            held -= gone
            cached[victim] -= gone
            if not cached[victim]:
                del cached[victim]
    return saved


def informed(trace: KVTrace, costs: Costs, blocks: int) -> dict[str, float]:
    """Cost that informed policies save, by name."""
    runs = Runs(trace)
    policies: Sequence[tuple[str, Informed]] = (
        ("LRU by value", Latest(keep_first=False)),
        ("first stays", Latest(keep_first=True)),
        ("rates known", fitted(trace, runs)),
    )
    return {name: saved_by(policy, trace, runs, costs, blocks) for name, policy in policies}
