"""``plan-estimates``: random workloads, estimated after a calibration and then measured."""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vllm_mm_ext.adapters.planning.estimates import Serving, estimate_load
from vllm_mm_ext.adapters.planning.simulated_engine import EngineShape
from vllm_mm_ext.planner.calibration_file import write
from vllm_mm_ext.planner.estimate import Estimate, Figures, figures_of, requests_of
from vllm_mm_ext.planner.rates import RatesRange
from vllm_mm_ext.planner.workload import Image, Video, Workload
from vllm_mm_ext.testing.checkpoints import FAMILIES, build
from vllm_mm_ext.testing.server import KV_CACHE_BYTES, Server
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.calibration.asker import Asker
from vllm_mm_ext.tools.calibration.calibrating import (
    Model,
    Setting,
    calibration,
    server_arguments,
)
from vllm_mm_ext.tools.calibration.measuring import Limits, observe, timed_server
from vllm_mm_ext.tools.calibration.media_files import parts_of
from vllm_mm_ext.tools.calibration.observations import Fitted, fitted

# Large enough that the model takes most of the time, as real ones do.
_SIZE = {"layers": 6, "hidden_size": 640, "vision_layers": 4, "audio_layers": 4}
_BLOCK = 32
_CLIENTS, _CLIENTS_OF_TEXT = (1, 2, 3, 4, 6), (1, 2, 4, 8, 16)
_SIZES = ((640, 360), (854, 480), (1280, 720))
_CALIBRATION = "plan-estimates-calibration.json"
# Requests that are sent once before a workload is measured.
_WARM_UP = 2
# Numbers of the first request of each workload: no two share any media.
_SPACING = 10_000


@dataclass(frozen=True)
class Site:
    """One of the servers.

    Attributes:
        slots: ``--max-num-seqs``.
        step_tokens: ``--max-num-batched-tokens``.
        workers: Decode workers.
    """

    slots: int
    step_tokens: int
    workers: int


SITES = (Site(16, 2048, 2), Site(4, 1024, 1))


def workloads(seed: int, count: int, modalities: frozenset[str]) -> list[Workload]:
    """Random workloads: texts, and each kind of media that a model takes, in turns.

    Args:
        seed: Of what is random.
        count: How many.
        modalities: What the model takes.
    """
    rng = np.random.default_rng(seed)
    kinds = ("text", "video", "image", "audio", "video", "mixed")
    known = {*modalities, "text"} | ({"mixed"} if modalities else set())
    turns = itertools.cycle(kind for kind in kinds if kind in known)
    found: list[Workload] = []
    while len(found) < count:
        kind = next(turns)
        videos: tuple[Video, ...] = ()
        images: tuple[Image, ...] = ()
        audios: tuple[float, ...] = ()
        if kind in ("video", "mixed") and "video" in modalities:
            width, height = _SIZES[int(rng.integers(len(_SIZES)))]
            seconds, fps = float(rng.integers(3, 13)), float(rng.integers(1, 3))
            sound = "audio" in modalities and bool(rng.integers(0, 2))
            videos = (Video(seconds, fps, width, height, sound=sound),)
        if kind in ("image", "mixed") and "image" in modalities:
            width, height = _SIZES[int(rng.integers(len(_SIZES)))]
            images = (Image(width, height),) * int(rng.integers(1, 3))
        if kind in ("audio", "mixed") and "audio" in modalities:
            audios = (float(rng.integers(3, 25)),)
        found.append(
            Workload(
                videos,
                audios,
                images,
                text=round(float(np.exp(rng.uniform(np.log(16), np.log(1500))))),
                output=int(rng.integers(4, 49)),
                concurrency=int(rng.choice(_CLIENTS if kind != "text" else _CLIENTS_OF_TEXT)),
            )
        )
    return found


def run(context: BenchContext, *, seed: int, count: int, family: str) -> BenchResult:
    """Calibrate on the first server, estimate, and measure the workloads on both in turns.

    Args:
        context: Of the benchmark.
        seed: Of the workloads.
        count: How many.
        family: Of the tiny model.
    """
    path = build(family, context.work_dir / f"{family}-estimates", **_size(family))
    usual = Setting.usual(is_cpu=True)
    model = Model(str(path), usual)
    asked = dict(enumerate(workloads(seed, count, model.modalities)))
    results: dict[int, tuple[Estimate, Figures]] = {}
    found: Fitted | None = None
    with context.steps("plan-estimates", 2 + count) as begin:
        begin("media")
        for number, workload in asked.items():
            for each in range(_WARM_UP + requests_of(workload.concurrency)):
                parts_of(workload, context.work_dir, _first(number) + each)
        for place, site in enumerate(SITES):
            setting = _setting(usual, site)
            arguments = server_arguments(model, setting)
            own = [number for number in asked if number % len(SITES) == place]
            with timed_server(
                str(path), context.work_dir, arguments, {"mm_ext": setting.settings}
            ) as (server, log):
                if found is None:
                    begin("calibration")
                    found = _calibrated(server, log, context.work_dir, model, setting)
                for number in own:
                    begin(f"workload {number + 1}")
                    results[number] = (
                        _estimated(model, setting, site, asked[number], found.rates),
                        asyncio.run(_measured(server, context.work_dir, asked[number], number)),
                    )
    assert found is not None
    ordered = [results[number] for number in asked]
    return BenchResult(
        "plan-estimates", _rows(list(asked.values()), ordered), _notes(found, ordered)
    )


def _calibrated(server: Server, log: Path, folder: Path, model: Model, setting: Setting) -> Fitted:
    hears = bool(model.planner.loaded.traits.hears_video)
    limits = Limits(model.modalities, hears, setting.context, setting.slots)
    seen = asyncio.run(observe(server, log, folder, limits, model.tokens_of))
    found = fitted(seen, model.tokens_of)
    write(calibration(model.facts.name, model.facts, setting, found), folder / _CALIBRATION)
    return found


def _size(family: str) -> dict[str, int]:
    takes = FAMILIES[family].modalities
    left_out = {"vision_layers"} if takes == {"audio"} else set()
    return {key: value for key, value in _SIZE.items() if key not in left_out}


def _setting(base: Setting, site: Site) -> Setting:
    media = {**base.settings["media"], "decode": {"workers": site.workers}}
    settings = {**base.settings, "media": media}
    return replace(base, slots=site.slots, step_tokens=site.step_tokens, settings=settings)


def _estimated(
    model: Model, setting: Setting, site: Site, workload: Workload, rates: RatesRange
) -> Estimate:
    loaded = model.planner.loaded
    # As vLLM sets it: a step's tokens, or what the largest item makes.
    most = loaded.processor.info.get_mm_max_tokens_per_item(
        loaded.config.model_config.max_model_len, dict.fromkeys(model.modalities, 1)
    )
    encoder_tokens = max(setting.step_tokens, *(most or {}).values())
    blocks = KV_CACHE_BYTES // (model.facts.kv_bytes_per_token() * _BLOCK)
    serving = Serving(
        slots=setting.slots,
        step_tokens=setting.step_tokens,
        context=setting.context,
        shape=EngineShape(_BLOCK, blocks, encoder_tokens),
        decode_workers=site.workers,
        cores=os.cpu_count() or 1,
    )
    return estimate_load(loaded.config, serving, workload, model.tokens_of(workload), rates)


def _first(number: int) -> int:
    """Number of the first request of a workload."""
    return _SPACING * (number + 1)


async def _measured(server: Server, folder: Path, workload: Workload, number: int) -> Figures:
    async with Asker.of(server.url, folder, first=_first(number)) as asker:
        bodies = await asker.prepare(workload, _WARM_UP + requests_of(workload.concurrency))
        for body in bodies[:_WARM_UP]:
            await asker.one(workload, body)
        found = await asker.clients(workload, workload.concurrency, bodies[_WARM_UP:])
    return figures_of([one.timing for one in found], workload.concurrency)


def _rows(asked: Sequence[Workload], results: Sequence[tuple[Estimate, Figures]]) -> list[Row]:
    rows = []
    for workload, (estimated, measured) in zip(asked, results, strict=True):
        name = _named(workload)
        for what, unit, scale, key in (
            ("TTFT p50", "ms", 1e3, "ttft_p50_s"),
            ("ITL p50", "ms", 1e3, "itl_p50_s"),
            ("requests", "1/s", 1.0, "requests_per_s"),
        ):
            rows.append(
                Row.of(
                    f"{name}: {what}",
                    unit,
                    stock=[scale * getattr(measured, key)],
                    plugin=[scale * getattr(estimated.middle, key)],
                )
            )
    return rows


def _named(workload: Workload) -> str:
    parts = [
        f"{video.seconds:g}s@{video.fps:g}fps:{video.height}p{'' if video.sound else ':silent'}"
        for video in workload.videos
    ]
    parts += [f"{seconds:g}s sound" for seconds in workload.audios]
    parts += [f"image {image.height}p" for image in workload.images]
    return ", ".join(
        [*parts, f"{workload.text} in, {workload.output} out, {workload.concurrency} at a time"]
    )


def _notes(found: Fitted, results: Sequence[tuple[Estimate, Figures]]) -> list[str]:
    steps = found.steps
    notes = [
        "stock: measured; plugin: estimated, in the same run, from the rates that are in "
        f"{_CALIBRATION} in the work directory",
        f"calibration: {steps.steps} steps, {steps.held_up:.0%} held up by something else, half of "
        f"the others within {steps.error:.0%} of what the rates add up to",
    ]
    for what, key in (("TTFT p50", "ttft_p50_s"), ("requests a second", "requests_per_s")):
        pairs = [(getattr(e.middle, key), getattr(m, key)) for e, m in results]
        errors = [abs(estimated / measured - 1) for estimated, measured in pairs]
        inside = sum(
            getattr(e.low, key) <= getattr(m, key) <= getattr(e.high, key) for e, m in results
        )
        right = _ordered_right(pairs)
        notes.append(
            f"{what}: error median {statistics.median(errors):.0%}, worst {max(errors):.0%}; "
            f"{inside} of {len(pairs)} within the range; order of two right in {right:.0%}"
        )
    return notes


def _ordered_right(pairs: Sequence[tuple[float, float]]) -> float:
    """Share of pairs of workloads that the estimates put into the order of the measurements."""
    right = [
        (one[0] < other[0]) == (one[1] < other[1])
        for one, other in itertools.combinations(pairs, 2)
    ]
    return statistics.fmean(right)
