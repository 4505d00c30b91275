"""``fleet``, part `simulated`: requests of real replicas replayed by ``vllm-mm simulate-fleet``.

In the rows, `stock` is what was measured and `plugin` what the simulation says.
"""

from __future__ import annotations

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
from vllm_mm_ext.testing.engine_arguments import BOTH_TIERS, as_flags
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
)
from vllm_mm_ext.tools.bench.fleet_study import (
    REPLICAS,
    SLOTS,
    STEP_TOKENS,
    FleetStudy,
    shares_of_cores,
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
    runs += [(name, study.routing[name][0], len(REPLICAS)) for name in ROUTINGS]
    rows = []
    for name, run, replicas in runs:
        served = replace(fleet, replicas=replicas)
        asks = asks_of(run.records, replicas)
        tally = simulate(served, asks, run.routing, unmeasured=replicas, clients=CLIENTS)
        rows += _rows(name, run, tally)
    cores = len(shares_of_cores()[0])
    study.notes.append(
        "simulated: `stock` is what was measured and `plugin` what the simulation says of the same "
        "requests in the same order, with costs calibrated in this run (half of the steps within "
        f"{error:.0%}); `one replica` has the same conversations alone. Each replica, and the "
        f"server that is calibrated, has {cores} of the cores to itself, for API server, decode "
        f"workers and engine; so has the simulated one. {CLIENTS} clients and the router, which "
        "are not simulated, take what is left of all cores"
    )
    return rows


def asks_of(records: Sequence[Record], warm: int) -> list[Ask]:
    """The requests of a run, in the order in which they were sent.

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
                _WARM_S,
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
        with study.replicas(media, KV_BLOCKS, REPLICAS[:1]) as servers:
            return play("round-robin", servers, videos, lambda _: servers[0])


def _fleet(study: FleetStudy) -> tuple[Fleet, float]:
    """A replica as it is served, with costs measured now, and how far steps are from these."""
    from vllm_mm_ext.tools.calibration.calibrating import Model, Setting, calibrate

    usual = Setting.usual(is_cpu=True)
    setting = replace(
        usual,
        # As replicas are served; the scheduler that logs steps stands for the plugin's.
        arguments=(*usual.arguments, "--block-size", str(BLOCK), *as_flags(BOTH_TIERS)),
        slots=SLOTS,
        step_tokens=STEP_TOKENS,
        settings=CONFIG["mm_ext"],
    )
    name = str(study.model)
    own_cores = shares_of_cores()[0]
    measured = calibrate(name, study.context.work_dir, setting, thread_bounds(), own_cores)
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
        decode_workers=min(len(own_cores), MAX_DEFAULT_WORKERS),
        slots=SLOTS,
        step_tokens=STEP_TOKENS,
        hidden_size=facts.text.hidden,
        rates=rates,
        cores=len(own_cores),
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
