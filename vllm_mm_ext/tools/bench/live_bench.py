"""``live``: live sessions against the same conversations as chat completions, alone and many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType

from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.live_answers import answers, hour
from vllm_mm_ext.tools.bench.live_load import dropped, fuzz, sessions
from vllm_mm_ext.tools.bench.live_senses import senses
from vllm_mm_ext.tools.bench.live_sides import Study
from vllm_mm_ext.tools.bench.live_timing import first_token, units

PARTS: Mapping[str, Callable[[Study], list[Row]]] = MappingProxyType(
    {
        "first-token": first_token,
        "units": units,
        "sessions": sessions,
        "dropped": dropped,
        "answers": answers,
        "fuzz": fuzz,
        "senses": senses,
        "hour": hour,
    }
)


def run(context: BenchContext, *, parts: Sequence[str] = tuple(PARTS)) -> BenchResult:
    """Measure the parts."""
    rows: list[Row] = []
    with ExitStack() as servers, context.steps("live", len(set(parts))) as begin:
        study = Study(context, servers)
        for name in [name for name in PARTS if name in parts]:
            begin(name)
            rows += PARTS[name](study)
    return BenchResult("live", rows, study.notes)
