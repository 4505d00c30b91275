"""``kv-replay``: KV accesses of an engine through vLLM's block pool and the plugin's, and bounds.

Deterministic. What a pool saves is counted in prefills of one token; the encoder's work counts as
well, unless its outputs are said to be held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.tools.bench.commands import AccessKind
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.inprocess import measure
from vllm_mm_ext.tools.bench.kv_bounds import informed, least_blocks, optimum, working_set
from vllm_mm_ext.tools.bench.kv_costs import Costs
from vllm_mm_ext.tools.bench.kv_generated import generated
from vllm_mm_ext.tools.bench.kv_replay_pools import Replay, Replayed
from vllm_mm_ext.tools.bench.kv_rules import RULES
from vllm_mm_ext.tools.bench.kv_trace import TRACES, KVTrace

ROOMS = (0.25, 0.5, 1.0)
# Share of the best informed policy that is wanted.
_BAR = 0.9


@dataclass(frozen=True)
class Outcome:
    """What was saved of a trace in a pool of one size.

    Attributes:
        blocks: Size of the pool.
        optimum: Cost that could be saved, an upper bound.
        informed: Cost that informed policies save, by name.
        stock: What vLLM's pool did.
        plugin: What the plugin's did.
    """

    blocks: int
    optimum: float
    informed: dict[str, float]
    stock: Replayed
    plugin: Replayed

    @property
    def best(self) -> float:
        """Cost that the best informed policy saves."""
        return max(self.informed.values())


def replay(trace: KVTrace, room: float, *, encoded: bool = False) -> Outcome:
    """Both pools and the bounds.

    Args:
        trace: The trace.
        room: Size of the pools, as a share of the working set; at least what requests need.
        encoded: Encoder outputs are held, so that KV saves prefill only.
    """
    blocks = max(int(room * working_set(trace)), least_blocks(trace))
    costs = Costs(trace, lambda _: encoded)
    return Outcome(
        blocks,
        optimum(trace, costs, blocks),
        informed(trace, costs, blocks),
        Replay(trace, blocks, None, lambda _: encoded).run(),
        Replay(trace, blocks, KVSettings(), lambda _: encoded).run(),
    )


def run(
    context: BenchContext,
    *,
    kinds: Sequence[AccessKind] = tuple(AccessKind),
    traces: Sequence[Path] = (),
    rooms: Sequence[float] = ROOMS,
    encoded: bool = False,
    seeds: range = range(0),
    ablate: bool = False,
) -> BenchResult:
    """All traces in pools of all sizes.

    Args:
        context: What to run with.
        kinds: Traces of the repository.
        traces: Other traces, instead of those.
        rooms: Sizes of the pools, as shares of a trace's working set.
        encoded: Encoder outputs are held, so that KV saves prefill only.
        seeds: Of generated traces of each kind, besides.
        ablate: Also change every rule and constant of the plugin's value in turn.
    """
    files = list(traces) or [TRACES / f"{kind}.txt" for kind in kinds]
    cases = [("", file.stem, KVTrace.read(file)) for file in files]
    cases += [("generated ", str(kind), generated(kind, seed)) for seed in seeds for kind in kinds]
    found: dict[tuple[str, str, float], list[Outcome]] = {}
    notes, replays = [], []
    count = len(cases) * len(rooms)
    with context.steps("kv-replay", count * (1 + len(RULES) * ablate)) as begin:
        for source, kind, trace in cases:
            for room in rooms:
                name = f"{source}{kind}, room for {room:g} of the working set"
                begin(name)
                outcome = replay(trace, room, encoded=encoded)
                if not outcome.optimum:
                    notes.append(f"{name}: nothing could be saved")
                    continue
                found.setdefault((source, kind, room), []).append(outcome)
                replays.append((trace, outcome))
                if not source:
                    notes.append(f"{name}: {_told(outcome)}")
        for source in dict.fromkeys(key[0] for key in found):
            outcomes = [one for key, own in found.items() if key[0] == source for one in own]
            shares = _Shares.of(outcomes, [one.plugin.saved for one in outcomes])
            notes.append(f"{source or 'recorded '}traces: {shares}")
        for rule, changed in RULES.items() if ablate and replays else ():
            saved = []
            for trace, outcome in replays:
                begin(rule)
                with changed():
                    again = Replay(trace, outcome.blocks, KVSettings(), lambda _: encoded).run()
                saved.append(again.saved)
            outcomes = [one for _, one in replays]
            before = _Shares.of(outcomes, [one.plugin.saved for one in outcomes])
            after = _Shares.of(outcomes, saved)
            notes.append(f"{rule}: {after}; on average {after.mean - before.mean:+.3f}")
    rows = [
        Row.of(
            f"{source}{kind}, room for {room:g} of the working set",
            "of optimum",
            stock=[one.stock.saved / one.optimum for one in outcomes],
            plugin=[one.plugin.saved / one.optimum for one in outcomes],
        )
        for (source, kind, room), outcomes in found.items()
    ]
    return BenchResult("kv-replay", rows, notes)


@dataclass(frozen=True)
class _Shares:
    """What a pool saves over many traces, as shares of the best informed policy and of stock."""

    mean: float
    worst: float
    below_bar: int
    over_stock: float
    below_stock: int
    count: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], saved: Sequence[float]) -> _Shares:
        pairs = list(zip(outcomes, saved, strict=True))
        known = [own / one.best for one, own in pairs]
        stock = [own / one.stock.saved for one, own in pairs if one.stock.saved] or [1.0]
        return cls(
            sum(known) / len(known),
            min(known),
            sum(share < _BAR for share in known),
            min(stock),
            sum(share < 1 - 1e-9 for share in stock),
            len(known),
        )

    def __str__(self) -> str:
        return (
            f"{self.mean:.3f} of the best informed policy on average, {self.worst:.3f} at worst, "
            f"{self.below_bar} of {self.count} below {_BAR}; {self.over_stock:.3f} of stock at "
            f"worst, {self.below_stock} below it"
        )


def _told(found: Outcome) -> str:
    best = ", ".join(
        f"{name} {saved / found.optimum:.3f}" for name, saved in found.informed.items()
    )
    missed = ", ".join(
        f"{reason} {cost / found.optimum:.2f}"
        for reason, cost in sorted(found.plugin.misses.items(), key=lambda each: -each[1])
    )
    return f"{found.blocks} blocks; informed: {best}; the plugin's misses: {missed or 'none'}"


def record(
    context: BenchContext, folder: Path, *, kinds: Sequence[AccessKind], seed: int, side: str
) -> None:
    """Record traces from an engine.

    Args:
        context: What to run with.
        folder: Where they are written.
        kinds: Kinds of traffic.
        seed: Of the traffic.
        side: ``stock`` or ``plugin``; the plugin cuts videos into segments.
    """
    model = build("qwen2_5_vl", context.work_dir / "qwen2_5_vl-tiny")
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [str(model), str(seed), str(folder.resolve()), *kinds]
    measure("kv_record_engine", side, arguments, timeout_s=1800)
