"""Part of ``bench fleet``: what an engine decodes of the videos that an encoder instance encodes.

One encoder serves two engines. One engine takes videos by the encoder's records. The other has
another decode limit, so no record fits it, and it decodes each video as well.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_mm_ext.testing.apart_servers import apart
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.memory import Role, cpu_seconds
from vllm_mm_ext.testing.server import Server
from vllm_mm_ext.tools.bench.bench_clips import cached_clip
from vllm_mm_ext.tools.bench.fleet_encode import ARGS, ENV, VIDEO_TOKENS, about, streamed
from vllm_mm_ext.tools.bench.fleet_study import FleetStudy
from vllm_mm_ext.tools.bench.harness import Row, percentile

VIDEO: dict[str, Any] = {"width": 1280, "height": 720, "duration": 6.0, "gop": 60}
# Clips that each engine is asked about first.
CLIPS = 6
SAMPLING = {"fps": 2.0, "max_frames": 12, "resolution": 224}


@dataclass
class Work:
    """What an engine did for its clips.

    Attributes:
        cpu_s: CPU seconds of its API server and its decode workers.
        jobs: Probes and decodes that its workers were given.
        recorded: Videos that it took by their records.
        ttft_s: Seconds to the first token of each answer.
        answers: The greedy answer about each clip.
    """

    cpu_s: dict[Role, float] = field(default_factory=dict)
    jobs: float = 0.0
    recorded: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)


def decode_once(study: FleetStudy) -> list[Row]:
    """What an engine decodes, by the encoder's records and without."""
    found: list[tuple[Work, Work]] = []
    for repeat in range(study.context.repeats):
        with TemporaryDirectory() as folder, TemporaryDirectory() as store:
            media = Path(folder)
            clips = _clips(study, media, 2 * CLIPS + 2)
            args = [*ARGS, "--allowed-local-media-path", str(media)]
            sides = apart(
                checkpoint("qwen2_5_vl"),
                Path(store),
                engines=2,
                args=args,
                env=ENV,
                settings=_settings(),
                engine_settings=[_settings(max_duration_s=14_000.0)],
            )
            with sides as servers:
                found.append(_both(servers.engines, clips, begin=repeat % 2))
    study.notes.append(
        f"decode-once: one encoder, two engines, {CLIPS} clips of {VIDEO['duration']:.0f} s of "
        "720p at 30 fps for each engine, in turn, one request at a time; then each is asked about "
        "the other's clips. Before: the engine decodes every video (no record fits its limits); "
        "after: it takes them by their records. Both fetch and probe every video."
    )

    def row(name: str, unit: str, value: Any) -> Row:
        before, after = zip(*found, strict=True)
        return Row.of(
            f"decode once: {name}",
            unit,
            stock=[value(one) for one in before],
            plugin=[value(one) for one in after],
        )

    differ = [
        sum(one.answers[name] != other.answers[name] for name in one.answers)
        for one, other in found
    ]
    return [
        row("decode jobs, probes among them", "count", lambda one: one.jobs),
        row("CPU of the engine's decode workers", "s", lambda one: one.cpu_s["decode"]),
        row("CPU of the engine's API server", "s", lambda one: one.cpu_s["api"]),
        row("first token, p50", "s", lambda one: percentile(one.ttft_s, 50)),
        row("videos by their records", "count", lambda one: one.recorded),
        Row.of("decode once: videos answered otherwise", "count", plugin=differ),
    ]


def _settings(**decode: float) -> dict[str, Any]:
    return {
        "quality": {"enabled": False},
        "segments": {"tokens": 128},
        "media": {"sampling": SAMPLING, "decode": {"workers": 1, **decode}},
    }


def _clips(study: FleetStudy, media: Path, count: int) -> list[Path]:
    """Clips without a picture in common, in the folder from which servers may read."""
    made = [cached_clip(study.context.work_dir, seed=700 + n, **VIDEO) for n in range(count)]
    return [Path(shutil.copy(clip, media / f"{n}.mp4")) for n, clip in enumerate(made)]


def _both(engines: list[Server], clips: list[Path], begin: int) -> tuple[Work, Work]:
    """What both engines did for clips of their own, one about the other."""
    before, after = Work(), Work()
    works = [(engines[0], before, clips[:CLIPS]), (engines[1], after, clips[CLIPS : 2 * CLIPS])]
    # The first requests pay for lazy imports and worker starts.
    for (engine, _, _), clip in zip(works, clips[2 * CLIPS :], strict=True):
        streamed(engine, about(clip), VIDEO_TOKENS)
    counted = [_counts(engine) for engine in engines]
    for number in range(CLIPS):
        for engine, work, own in works[begin:] + works[:begin]:
            times, said = streamed(engine, about(own[number]), VIDEO_TOKENS)
            work.ttft_s.append(times[1] - times[0])
            work.answers[own[number].name] = said
    for (engine, work, _), (cpu, jobs, recorded) in zip(works, counted, strict=True):
        now, all_jobs, all_recorded = _counts(engine)
        work.cpu_s = {role: now[role] - cpu[role] for role in cpu}
        work.jobs, work.recorded = all_jobs - jobs, all_recorded - recorded
    for engine, work, _ in works:
        for clip in clips[: 2 * CLIPS]:
            if clip.name not in work.answers:
                _, work.answers[clip.name] = streamed(engine, about(clip), VIDEO_TOKENS)
    return before, after


def _counts(engine: Server) -> tuple[dict[Role, float], float, float]:
    """CPU seconds by role, jobs of decode workers, and videos by their records, so far."""
    cpu = cpu_seconds(engine.pid)
    jobs = engine.metric("mm_ext_decode_jobs_started_total")
    return cpu, jobs, engine.metric("mm_ext_recorded_videos_total", outcome="recorded")
