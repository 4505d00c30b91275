"""``fleet``: several servers behind a router: what goes where, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from vllm_mm_ext.tools.bench.fleet_balance import balance
from vllm_mm_ext.tools.bench.fleet_decode import decode_once
from vllm_mm_ext.tools.bench.fleet_encode import encode_apart, encoder_killed
from vllm_mm_ext.tools.bench.fleet_moves import moves
from vllm_mm_ext.tools.bench.fleet_routing import routing
from vllm_mm_ext.tools.bench.fleet_simulated import simulated
from vllm_mm_ext.tools.bench.fleet_study import FleetStudy
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row, run_parts

PARTS: Mapping[str, Callable[[FleetStudy], list[Row]]] = MappingProxyType(
    {
        "routing": routing,
        "balance": balance,
        "moves": moves,
        "encode-apart": encode_apart,
        "decode-once": decode_once,
        "encoder-killed": encoder_killed,
        "simulated": simulated,
    }
)


def run(context: BenchContext, *, parts: Sequence[str] = tuple(PARTS)) -> BenchResult:
    """Measure the parts."""
    return run_parts(context, "fleet", PARTS, parts, FleetStudy)
