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
from vllm_mm_ext.tools.bench.kv_replay_pools import Replay, Replayed
from vllm_mm_ext.tools.bench.kv_trace import TRACES, KVTrace

ROOMS = (0.25, 0.5, 1.0)


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
) -> BenchResult:
    """All traces in pools of all sizes.

    Args:
        context: What to run with.
        kinds: Traces of the repository.
        traces: Other traces, instead of those.
        rooms: Sizes of the pools, as shares of a trace's working set.
        encoded: Encoder outputs are held, so that KV saves prefill only.
    """
    files = list(traces) or [TRACES / f"{kind}.txt" for kind in kinds]
    rows, notes, shares = [], [], []
    with context.steps("kv-replay", len(files) * len(rooms)) as begin:
        for file in files:
            trace = KVTrace.read(file)
            for room in rooms:
                name = f"{file.stem}, room for {room:g} of the working set"
                begin(name)
                found = replay(trace, room, encoded=encoded)
                if not found.optimum:
                    notes.append(f"{name}: nothing could be saved")
                    continue
                rows.append(
                    Row.of(
                        name,
                        "of optimum",
                        stock=[found.stock.saved / found.optimum],
                        plugin=[found.plugin.saved / found.optimum],
                    )
                )
                notes.append(f"{name}: {_told(found)}")
                shares.append(
                    (found.plugin.saved / found.best, found.plugin.saved / found.stock.saved)
                    if found.stock.saved
                    else (found.plugin.saved / found.best, 1.0)
                )
    if shares:
        to_best, to_stock = (min(each) for each in zip(*shares, strict=True))
        mean = sum(share for share, _ in shares) / len(shares)
        notes.append(
            f"plugin over the best informed policy: {mean:.3f} on average, {to_best:.3f} at worst; "
            f"over stock at worst {to_stock:.3f}"
        )
    return BenchResult("kv-replay", rows, notes)


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
