"""``fleet``: several servers behind a router: what goes where, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType

from vllm_mm_ext.tools.bench.fleet_balance import balance
from vllm_mm_ext.tools.bench.fleet_encode import encode_apart, encoder_killed
from vllm_mm_ext.tools.bench.fleet_moves import moves
from vllm_mm_ext.tools.bench.fleet_routing import routing
from vllm_mm_ext.tools.bench.fleet_simulated import simulated
from vllm_mm_ext.tools.bench.fleet_study import FleetStudy
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

PARTS: Mapping[str, Callable[[FleetStudy], list[Row]]] = MappingProxyType(
    {
        "routing": routing,
        "balance": balance,
        "moves": moves,
        "encode-apart": encode_apart,
        "encoder-killed": encoder_killed,
        "simulated": simulated,
    }
)


def run(context: BenchContext, *, parts: Sequence[str] = tuple(PARTS)) -> BenchResult:
    """Measure the parts."""
    rows: list[Row] = []
    with ExitStack() as servers, context.steps("fleet", len(set(parts))) as begin:
        study = FleetStudy(context, servers)
        for name in [name for name in PARTS if name in parts]:
            begin(name)
            rows += PARTS[name](study)
    return BenchResult("fleet", rows, study.notes)
