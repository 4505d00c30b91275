"""``cache-policies``: cost that eviction saves on three kinds of traces, next to the optimum."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.informed import INFORMED, Popular
from vllm_mm_ext.tools.bench.simulate import POLICIES, Policy, cost_saved, optimum
from vllm_mm_ext.tools.bench.traces import FAMILIES, WORKING_SET, Trace

OURS = "cost-aware"
# It knows the distributions, and it knows which item has which popularity as well.
KNOWING, ITEMS = "informed", "items known"
OPTIMUM = "optimum"
# Share of the cost saved by the optimum that is aimed at.
BAR = 0.85
SEEDS = 3
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
        return f"{self.pool}, room for {self.share:g} of the working set"

    @property
    def pool(self) -> str:
        """Name of the cases that differ in capacity only."""
        kind = "equal items" if self.equal else "sizes and costs differ"
        return f"{self.family}, {kind}"


CASES = tuple(
    Case(family, equal, share)
    for family, shares in CAPACITIES.items()
    for equal in (False, True)
    for share in shares
)


def cost_by_policy(case: Case, seed: int, *, length: int = 4000) -> dict[str, float]:
    """Cost each policy saves on one trace; that of the optimum under ``OPTIMUM``."""
    trace = FAMILIES[case.family](seed, length=length, equal=case.equal)
    capacity = case.share * WORKING_SET[case.family] * _mean_size(trace)
    most = optimum(trace, capacity)
    policies: dict[str, Callable[[], Policy]] = {**POLICIES, KNOWING: INFORMED[case.family]}
    if case.family != "sessions":
        policies[ITEMS] = lambda: Popular(case.family)
    saved = {name: cost_saved(make(), trace, capacity) for name, make in policies.items()}
    return saved | {OPTIMUM: most}


def shares_of_optimum(case: Case, seed: int, *, length: int = 4000) -> dict[str, float]:
    """Cost each policy saves on one trace, as a share of the most that can be saved."""
    return _shares(cost_by_policy(case, seed, length=length))


def _shares(saved: Mapping[str, float]) -> dict[str, float]:
    return {name: cost / saved[OPTIMUM] for name, cost in saved.items() if name != OPTIMUM}


def run(context: BenchContext) -> BenchResult:
    """All families and capacities; each repeat is another set of traces."""
    found: dict[Case, dict[str, list[float]]] = {}
    costs: dict[str, dict[str, list[float]]] = {}
    with context.steps("cache-policies", len(CASES)) as begin:
        for case in CASES:
            begin(case.name)
            found[case] = defaultdict(list)
            total = costs.setdefault(case.pool, defaultdict(list))
            for seed in range(SEEDS * context.repeats):
                saved = cost_by_policy(case, seed)
                for name, cost in saved.items():
                    total[name].append(cost)
                for name, share in _shares(saved).items():
                    found[case][name].append(share)
    rows = [
        Row.of(
            f"{pool}, all capacities together",
            "of optimum",
            stock=[sum(total["LRU"]) / sum(total[OPTIMUM])],
            plugin=[sum(total[OURS]) / sum(total[OPTIMUM])],
        )
        for pool, total in costs.items()
    ]
    rows += [
        Row.of(case.name, "of optimum", stock=shares["LRU"], plugin=shares[OURS])
        for case, shares in found.items()
    ]
    target = context.work_dir / "cache-policies.png"
    plot(found, target)
    return BenchResult("cache-policies", rows, [*_notes(found), f"plot: {target.name}"])


def _mean_size(trace: Trace) -> float:
    return statistics.mean({request.key: request.size for request in trace}.values())


def _notes(found: Mapping[Case, Mapping[str, Sequence[float]]]) -> list[str]:
    traces = [
        {name: shares[name][seed] for name in shares}
        for shares in found.values()
        for seed in range(len(shares[OURS]))
    ]
    reach = {name: sum(one[name] >= BAR for one in traces) for name in (*POLICIES, KNOWING)}
    missed = [one for one in traces if one[OURS] < BAR <= one[KNOWING]]
    return [
        "stock: LRU; plugin: the policy of encoder cache and KV blocks; shares of the cost that "
        "the optimum saves, which knows the whole trace",
        f"{KNOWING}: knows the distributions traces are drawn from, not the draws; {ITEMS}: knows "
        "from the start how popular each item is",
        *(
            f"{case.name}: "
            + ", ".join(f"{name} {statistics.median(some):.3f}" for name, some in shares.items())
            for case, shares in found.items()
        ),
        f"of {len(traces)} traces reach {BAR:.0%}: "
        + ", ".join(f"{name} {count}" for name, count in reach.items()),
        f"{len(missed)} of them only the informed policy, which has there at most "
        f"{max((one[KNOWING] for one in missed), default=0.0):.3f}",
        f"the plugin's worst trace, next to the informed policy on the same one: "
        f"{min(one[OURS] / one[KNOWING] for one in traces):.3f}x; next to LRU: "
        f"{min(one[OURS] / one['LRU'] for one in traces if one['LRU'] > 0):.3f}x",
    ]


def plot(found: Mapping[Case, Mapping[str, Sequence[float]]], target: Path) -> None:
    """Share of the optimum over capacity, one panel for each family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    for panel, family in zip(panels, FAMILIES, strict=True):
        for number, name in enumerate((*POLICIES, KNOWING)):
            for equal, style in ((False, "-"), (True, ":")):
                cases = [case for case in found if (case.family, case.equal) == (family, equal)]
                panel.plot(
                    [case.share for case in cases],
                    [statistics.median(found[case][name]) for case in cases],
                    style,
                    marker="o",
                    color=f"C{number}",
                    label=None if equal else name,
                )
        panel.set(title=family, xlabel="capacity / working set", ylim=(0, 1.02))
        panel.axhline(BAR, color="grey", linewidth=0.8)
    panels[0].set_ylabel("cost saved / optimum")
    panels[0].legend(loc="lower right")
    figure.savefig(target, dpi=120)
