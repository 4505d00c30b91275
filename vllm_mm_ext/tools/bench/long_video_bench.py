"""``long-video``: questions about hours of video by windows, against a single pass and stock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType

from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.long_video_client import Asker
from vllm_mm_ext.tools.bench.long_video_files import Films, composer_server
from vllm_mm_ext.tools.bench.long_video_parts import (
    Part,
    Study,
    accuracy,
    disconnect,
    repeated,
    second,
    tokens,
)
from vllm_mm_ext.tools.bench.long_video_sides import decode, memory, sequential
from vllm_mm_ext.tools.bench.long_video_text import text

# With one server of the composer for all of them; each has videos of its own.
_SHARED: Mapping[str, Part] = MappingProxyType(
    {
        "accuracy": accuracy,
        "tokens": tokens,
        "second": second,
        "repeated": repeated,
        "disconnect": disconnect,
    }
)
_APART: Mapping[str, Part] = MappingProxyType(
    {"sequential": sequential, "memory": memory, "decode": decode, "text": text}
)
PARTS: Mapping[str, Part] = MappingProxyType({**_SHARED, **_APART})


def run(
    context: BenchContext,
    *,
    minutes: Sequence[int] = (10,),
    parts: Sequence[str] = tuple(PARTS),
    questions: int = 16,
    rolling: bool = False,
) -> BenchResult:
    """Measure the parts on generated recordings; each repeat has recordings of its own.

    Args:
        context: What to run with.
        minutes: Lengths of the recordings.
        parts: What is measured.
        questions: About each recording of the parts that count right or equal answers, at most.
        rolling: Count right answers of the strategy ``rolling`` too.
    """
    study = Study(
        context, Films(context.work_dir), sorted(set(minutes)), questions, rolling=rolling
    )
    rows: list[Row] = []
    with ExitStack() as stack:
        begin = stack.enter_context(context.steps("long-video", len(set(parts))))
        with ExitStack() as server:
            for name in [name for name in _SHARED if name in parts]:
                begin(name)
                if study.asker is None:
                    study.asker = Asker(server.enter_context(composer_server(study.films)))
                rows += _SHARED[name](study)
        for name in [name for name in _APART if name in parts]:
            begin(name)
            rows += _APART[name](study)
    notes = [
        "stock column: what each row names first (a single pass that fits the context, the first "
        "question, all windows, stock vLLM, the shorter video); plugin column: what it names last",
        f"generated recordings of {', '.join(map(str, study.minutes))} min, 128x128, 20 fps, with "
        "sound; events of 0.2 to 1.2 s; an answer is right when it says exactly what is true",
        *study.notes,
    ]
    return BenchResult("long-video", rows, notes)
