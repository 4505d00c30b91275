"""Running eviction policies over traces: what each saves, and the most that could be saved."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from vllm_mm_ext.policies.eviction.cost_aware import CostAware
from vllm_mm_ext.tools.bench.traces import Request, Trace


class Policy(Protocol):
    """What a simulated cache asks of an eviction policy."""

    def admit(self, key: int, size: float, cost: float) -> None:
        """An item was computed and is cached now."""

    def hit(self, key: int) -> None:
        """A cached item was used."""

    def victim(self) -> int | None:
        """The item to evict next."""

    def evict(self, key: int) -> None:
        """An item was evicted."""


class Queue:
    """First in, first out; or least recently used, where a hit moves an item back.

    Args:
        recency: True: LRU. False: FIFO.
    """

    def __init__(self, *, recency: bool) -> None:
        self._recency = recency
        self._keys: OrderedDict[int, None] = OrderedDict()

    def admit(self, key: int, size: float, cost: float) -> None:  # noqa: ARG002 - Policy
        self._keys[key] = None

    def hit(self, key: int) -> None:
        if self._recency:
            self._keys.move_to_end(key)

    def victim(self) -> int | None:
        return next(iter(self._keys), None)

    def evict(self, key: int) -> None:
        del self._keys[key]


POLICIES: dict[str, Callable[[], Policy]] = {
    "LRU": lambda: Queue(recency=True),
    "FIFO": lambda: Queue(recency=False),
    "cost-aware": CostAware,
}


def cost_saved(policy: Policy, trace: Trace, capacity: float) -> float:
    """Cost that hits save over a trace.

    An item is computed and admitted on every miss, and items are evicted while there are more than
    fit; the policy may choose the one that has just come.

    Args:
        policy: A new policy; it is changed.
        trace: The requests.
        capacity: Of the cache, in the unit of the sizes.
    """
    cached: dict[int, float] = {}
    held = saved = 0.0
    for request in trace:
        if request.key in cached:
            policy.hit(request.key)
            saved += request.cost
            continue
        if request.size > capacity:
            continue
        cached[request.key] = request.size
        held += request.size
        policy.admit(request.key, request.size, request.cost)
        while held > capacity and len(cached) > 1:
            victim = policy.victim()
            assert victim is not None
            policy.evict(victim)
            held -= cached.pop(victim)
    return saved


def optimum(trace: Trace, capacity: float) -> float:
    """The most that any policy, knowing the whole trace, could save: an upper bound.

    Keeping an item from one use to the next is an interval that saves its cost and takes its size
    in between. The best choice of whole intervals is relaxed to fractions, a linear program (as in
    Berger et al., "Practical Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS
    2018). With equal sizes its matrix is that of intervals, so the bound is the optimum; with
    equal costs as well it is what Belady's rule saves.

    Args:
        trace: The requests.
        capacity: Of the cache, in the unit of the sizes.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    kept = _intervals(trace, capacity)
    if not kept:
        return 0.0
    count, steps = len(kept), len(trace)
    # Unknowns: the share of each interval that is kept, then the bytes held after each request.
    # bytes[t] = bytes[t - 1] + what begins to be kept at t - what is kept until t
    rows, columns, values = [], [], []
    for column, (start, end, request) in enumerate(kept):
        rows += [start, end]
        columns += [column, column]
        values += [-request.size, request.size]
    for step in range(steps):
        rows += [step, step + 1] if step + 1 < steps else [step]
        columns += [count + step] * (2 if step + 1 < steps else 1)
        values += [1.0, -1.0] if step + 1 < steps else [1.0]
    found = linprog(
        c=np.concatenate([[-request.cost for _, _, request in kept], np.zeros(steps)]),
        A_eq=coo_matrix((values, (rows, columns)), shape=(steps, count + steps)).tocsr(),
        b_eq=np.zeros(steps),
        bounds=[(0.0, 1.0)] * count + [(0.0, capacity)] * steps,
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"no optimum found: {found.message}")
    return -float(found.fun)


def _intervals(trace: Trace, capacity: float) -> list[tuple[int, int, Request]]:
    """From each use of an item to its next, where it fits."""
    last: dict[int, int] = {}
    found = []
    for step, request in enumerate(trace):
        if request.key in last and request.size <= capacity:
            found.append((last[request.key], step, request))
        last[request.key] = step
    return found
