"""``live``: live sessions against the same conversations as chat completions, alone and many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row, run_parts
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
    return run_parts(context, "live", PARTS, parts, Study)
