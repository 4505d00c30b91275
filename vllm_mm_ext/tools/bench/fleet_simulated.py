"""``fleet``, part `simulated`: requests of real replicas replayed by ``vllm-mm simulate-fleet``.

In the rows, `stock` is what was measured and `plugin` what the simulation says.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import replace

from vllm_mm_ext.config.encoder_cache_settings import EncoderCacheSettings
from vllm_mm_ext.config.media_settings import CacheConfig
from vllm_mm_ext.fleet.shapes import MediumCosts, ReplicaShape
from vllm_mm_ext.fleet.simulation import Fleet, simulate
from vllm_mm_ext.fleet.tally import Tally
from vllm_mm_ext.fleet.traffic import Ask
from vllm_mm_ext.media.decode.pool import MAX_DEFAULT_WORKERS
from vllm_mm_ext.planner.memory_parts import encoder_cache_bytes
from vllm_mm_ext.planner.workload import Video, Workload
from vllm_mm_ext.tools.bench.conversations_engine import BLOCK, CONFIG, FPS
from vllm_mm_ext.tools.bench.fleet_routing import (
    ANSWER_TOKENS,
    CLIENTS,
    CONVERSATIONS,
    KV_BLOCKS,
    ROUTINGS,
    TURNS,
    Record,
    RoutingRun,
    play,
    played_by,
)
from vllm_mm_ext.tools.bench.fleet_study import (
    REPLICAS,
    SLOTS,
    STEP_TOKENS,
    FleetStudy,
    thread_bounds,
)
from vllm_mm_ext.tools.bench.harness import Row

# Long enough for replicas to have answered what was asked to warm them.
_WARM_S = 60.0
# The clips of `FleetStudy.videos`.
_CLIP = Video(10.0, float(FPS), 448, 224, source_fps=4.0, sound=False)


def simulated(study: FleetStudy) -> list[Row]:
    """Hits, tokens encoded and first tokens: of one replica, and of two by each routing."""
    fleet, error = _fleet(study)
    runs = [("one replica", _alone(study), 1)]
    for name in ROUTINGS:
        # One at a time, replicas do not share cores; in a fleet each has its own.
        runs.append((f"{name}, one at a time", played_by(study, name, 1), len(REPLICAS)))
        runs.append((f"{name}, {CLIENTS} at a time", study.routing[name][0], len(REPLICAS)))
    rows = []
    for name, run, replicas in runs:
        served = replace(fleet, replicas=replicas)
        asks = asks_of(run.records, replicas)
        tally = simulate(served, asks, run.routing, unmeasured=replicas)
        rows += _rows(name, run, tally)
    study.notes.append(
        "simulated: `stock` is what was measured and `plugin` what the simulation says of the same "
        "requests at the same times, with costs calibrated in this run (half of the steps within "
        f"{error:.0%}); `one replica` has the same conversations alone. That replicas share this "
        "machine's cores is not simulated"
    )
    return rows


def asks_of(records: Sequence[Record], warm: int) -> list[Ask]:
    """The requests of a run, at the times at which they were sent.

    Args:
        records: As they were sent.
        warm: So many questions about other videos had been asked before, one of each replica.
    """
    text = records[0].prompt_tokens - records[0].media_tokens
    asks = [
        Ask(0.0, CONVERSATIONS + number, CONVERSATIONS + number, 0, text, ANSWER_TOKENS, last=True)
        for number in range(warm)
    ]
    before = dict[int, int]()
    for record in records:
        number, first = record.conversation, record.turn == 1
        text = record.prompt_tokens - before.get(number, record.media_tokens)
        before[number] = record.prompt_tokens + record.answer_tokens
        asks.append(
            Ask(
                _WARM_S + record.sent_s,
                number,
                number if first else -1,
                0,
                text,
                record.answer_tokens,
                last=record.turn == TURNS,
                # The clients send fixed replies back.
                kept=False,
            )
        )
    return asks


def _alone(study: FleetStudy) -> RoutingRun:
    """The conversations on one replica."""
    with study.context.scratch() as media:
        videos = study.videos(media, 0, CONVERSATIONS)
        with study.replicas(media, KV_BLOCKS) as servers:
            return play("round-robin", servers, videos, lambda _: servers[0], CLIENTS)


def _fleet(study: FleetStudy) -> tuple[Fleet, float]:
    """A replica as it is served, with costs measured now, and how far steps are from these."""
    from vllm_mm_ext.tools.calibration.calibrating import Model, Setting, calibrate

    setting = replace(
        Setting.usual(is_cpu=True),
        slots=SLOTS,
        step_tokens=STEP_TOKENS,
        settings=CONFIG["mm_ext"],
    )
    name = str(study.model)
    measured = calibrate(name, study.context.work_dir, setting, thread_bounds())
    rates = measured.rates.middle
    model = Model(name, setting)
    facts, caches = model.facts, CacheConfig()
    clip = Workload(videos=(_CLIP,))
    shape = ReplicaShape(
        # One is vLLM's null block.
        kv_blocks=KV_BLOCKS - 1,
        block_size=BLOCK,
        device_bytes=encoder_cache_bytes(facts, STEP_TOKENS),
        host_bytes=round(EncoderCacheSettings().host_mb) << 20,
        decoded_bytes=caches.decoded_mb << 20,
        decode_workers=min(len(os.sched_getaffinity(0)), MAX_DEFAULT_WORKERS),
        slots=SLOTS,
        step_tokens=STEP_TOKENS,
        hidden_size=facts.text.hidden,
        rates=rates,
    )
    costs = MediumCosts.of(facts, clip, model.tokens_of(clip), rates)
    return Fleet(shape, (costs,), 1), measured.step_error


def _rows(name: str, run: RoutingRun, tally: Tally) -> list[Row]:
    def row(what: str, unit: str, measured: float, said: float) -> Row:
        return Row.of(f"simulated: {name}, {what}", unit, stock=[measured], plugin=[said])

    waited = statistics.median(record.ttft_s for record in run.records)
    encoded = sum(run.encoded.values())
    return [
        row(
            "KV hits of follow-ups",
            "share",
            run.hit_share(),
            tally.later_found / tally.later_tokens,
        ),
        row("encoder tokens computed", "tokens", encoded, tally.encoded_tokens),
        row("TTFT p50", "ms", 1e3 * waited, 1e3 * tally.all.p50),
    ]
