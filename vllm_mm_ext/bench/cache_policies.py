"""``cache-policies``: cost that eviction saves on three kinds of traces, next to the optimum."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_mm_ext.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.caching.simulate import POLICIES, Policy, cost_saved, optimum
from vllm_mm_ext.caching.traces import FAMILIES, Trace, popularity

OURS, INFORMED = "cost-aware", "informed"
SEEDS = 3
# Of each family, the number of items that are asked for again and again at any time.
WORKING_SET = {"zipf": 400, "sessions": 60, "scans": 100}
# Capacities as shares of the working set. A tenth of the items is most of the requests in Zipf.
CAPACITIES = {"zipf": (0.1, 0.25, 0.5), "sessions": (0.5, 1.0, 1.5), "scans": (0.5, 1.0, 2.0)}


@dataclass(frozen=True)
class Case:
    """One kind of trace and size of cache.

    Attributes:
        family: Of ``FAMILIES``.
        equal: All items have one size and cost.
        share: Capacity as a share of the mean size of the working set.
    """

    family: str
    equal: bool
    share: float

    @property
    def name(self) -> str:
        """As printed."""
        kind = "equal items" if self.equal else "sizes and costs differ"
        return f"{self.family}, {kind}, room for {self.share:g} of the working set"


CASES = tuple(
    Case(family, equal, share)
    for family, shares in CAPACITIES.items()
    for equal in (False, True)
    for share in shares
)


def shares_of_optimum(case: Case, seed: int, *, length: int = 4000) -> dict[str, float]:
    """Cost each policy saves on one trace, as a share of the most that can be saved."""
    trace = FAMILIES[case.family](seed, length=length, equal=case.equal)
    capacity = case.share * WORKING_SET[case.family] * _mean_size(trace)
    most = optimum(trace, capacity)
    policies: dict[str, Callable[[], Policy]] = dict(POLICIES)
    if known := popularity(case.family):
        policies[INFORMED] = lambda: _Informed(known)
    return {name: cost_saved(make(), trace, capacity) / most for name, make in policies.items()}


def run(context: BenchContext) -> BenchResult:
    """All families and capacities; each repeat is another set of traces."""
    found: dict[Case, dict[str, list[float]]] = {}
    with context.steps("cache-policies", len(CASES)) as begin:
        for case in CASES:
            begin(case.name)
            found[case] = defaultdict(list)
            for seed in range(SEEDS * context.repeats):
                for name, share in shares_of_optimum(case, seed).items():
                    found[case][name].append(share)
    rows = [
        Row.of(case.name, "of optimum", stock=shares["LRU"], plugin=shares[OURS])
        for case, shares in found.items()
    ]
    target = context.work_dir / "cache-policies.png"
    plot(found, target)
    return BenchResult("cache-policies", rows, [*_notes(found), f"plot: {target.name}"])


class _Informed:
    """Keeps what is asked for most, per byte and cost: it knows the popularity of all items.

    Args:
        popularity: By item; 0 for those that are not asked for again.
    """

    def __init__(self, popularity: Mapping[int, float]) -> None:
        self._popularity = popularity
        self._worth: dict[int, float] = {}

    def admit(self, key: int, size: float, cost: float) -> None:
        self._worth[key] = self._popularity.get(key, 0.0) * cost / size

    def hit(self, key: int) -> None:
        """Nothing to learn."""

    def victim(self) -> int | None:
        return min(self._worth, key=lambda key: self._worth[key], default=None)

    def evict(self, key: int) -> None:
        del self._worth[key]


def _mean_size(trace: Trace) -> float:
    return statistics.mean({request.key: request.size for request in trace}.values())


def _notes(found: Mapping[Case, Mapping[str, Sequence[float]]]) -> list[str]:
    ours = [share for shares in found.values() for share in shares[OURS]]
    fifo = [share for shares in found.values() for share in shares["FIFO"]]
    worst = min(
        one / other
        for shares in found.values()
        for one, other in zip(shares[OURS], shares["LRU"], strict=True)
        if other > 0
    )
    return [
        "stock: LRU; plugin: the policy of encoder cache and KV blocks; shares of the cost that "
        "the optimum saves, which knows the whole trace",
        f"of {len(ours)} traces {sum(share >= 0.85 for share in ours)} reach 85 %; "
        f"FIFO: {sum(share >= 0.85 for share in fifo)}",
        "who knows the popularity of all items from the start, but not the future, saves: "
        + "; ".join(
            f"{case.name}: {statistics.median(shares[INFORMED]):.2f}"
            for case, shares in found.items()
            if INFORMED in shares
        ),
        f"the plugin's worst trace, next to LRU on the same one: {worst:.3f}x",
    ]


def plot(found: Mapping[Case, Mapping[str, Sequence[float]]], target: Path) -> None:
    """Share of the optimum over capacity, one panel for each family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    for panel, family in zip(panels, FAMILIES, strict=True):
        for name in POLICIES:
            for equal, style in ((False, "-"), (True, ":")):
                cases = [case for case in found if (case.family, case.equal) == (family, equal)]
                panel.plot(
                    [case.share for case in cases],
                    [statistics.median(found[case][name]) for case in cases],
                    style,
                    marker="o",
                    color=f"C{list(POLICIES).index(name)}",
                    label=None if equal else name,
                )
        panel.set(title=family, xlabel="capacity / working set", ylim=(0, 1.02))
        panel.axhline(0.85, color="grey", linewidth=0.8)
    panels[0].set_ylabel("cost saved / optimum")
    panels[0].legend(loc="lower right")
    figure.savefig(target, dpi=120)
