"""A plan as tables for a terminal, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_mm_ext.planner.estimate import Estimate, Figures
from vllm_mm_ext.planner.levers import Lever, words_of
from vllm_mm_ext.planner.memory_parts import Part, request_bytes, total
from vllm_mm_ext.planner.plan import Plan
from vllm_mm_ext.planner.request_tokens import MediumTokens

_GIB = 1 << 30
_NAMES = {"video": "video", "audio": "sound", "image": "image"}


@dataclass(frozen=True)
class Expected:
    """What clients see of a plan's server.

    Attributes:
        estimate: The figures with their range.
        source: Where they are from.
        per_hour: Price of all GPUs for an hour; None if it is not known.
        decode_s: CPU seconds of decode workers for a request: least, likely and most.
        follow_up_s: The same of seconds to the first token of a follow-up that is asked alone.
    """

    estimate: Estimate
    source: str
    per_hour: float | None
    decode_s: tuple[float, float, float]
    follow_up_s: tuple[float, float, float]

    def rows(self) -> list[tuple[str, float, float, float]]:
        """Name and low, middle and high value of each figure."""
        estimate = self.estimate
        low, middle, high = (
            self._values(*each)
            for each in zip(
                (estimate.low, estimate.middle, estimate.high),
                self.decode_s,
                self.follow_up_s,
                strict=True,
            )
        )
        return [
            (name, *sorted((low[name], middle[name], high[name])))  # type: ignore[misc]
            for name in middle
        ]

    def _values(self, figures: Figures, decode_s: float, follow_up_s: float) -> dict[str, float]:
        values = {
            "seconds to the first token, median": figures.ttft_p50_s,
            "seconds to the first token, slowest in 20": figures.ttft_p95_s,
            "seconds to the first token, a follow-up alone": follow_up_s,
            "seconds between tokens": figures.itl_p50_s,
            "requests a second": figures.requests_per_s,
            "CPU seconds of decoding, a request": decode_s,
            "cores that decoding keeps busy": decode_s * figures.requests_per_s,
        }
        if self.per_hour is not None:
            values["price of 1,000 requests"] = self.per_hour / (3.6 * figures.requests_per_s)
        return values


def show_plan(
    console: Console, plan: Plan, found: Sequence[Lever], expected: Expected | None
) -> None:
    """Print a plan.

    Args:
        console: Where to.
        plan: The plan.
        found: What makes it fit, if it does not.
        expected: What clients see; None if that is not known.
    """
    site = plan.site
    where = site.gpu.title if site.gpu.is_cpu else f"{site.tp * site.dp} x {site.gpu.title}"
    console.print(f"[bold]{plan.facts.name}[/] on {where}", highlight=False)
    console.print(_tokens(plan))
    console.print(_request(plan))
    if not site.gpu.is_cpu:
        console.print(_memory("memory of each GPU", [*plan.engine, plan.kv]))
    console.print(_memory("memory of the machine", plan.host))
    console.print(str(plan.container), highlight=False, style="dim")
    if expected is not None:
        console.print(_estimates(expected))
        busiest = expected.estimate.limit
        share = f"{expected.estimate.busy[busiest]:.0%}"
        console.print(f"Busiest: {busiest}, {share} of the time.", highlight=False)
        console.print(f"Estimates are {expected.source}.", highlight=False, style="dim")
    _verdict(console, plan, found)


def _estimates(expected: Expected) -> Table:
    table = Table(title="estimate", title_justify="left")
    table.add_column("")
    for name in ("low", "likely", "high"):
        table.add_column(name, justify="right")
    for name, *values in expected.rows():
        table.add_row(name, *(f"{value:,.3g}" for value in values))
    return table


def _tokens(plan: Plan) -> Table:
    table = Table(title="tokens of one request", title_justify="left")
    for name in ("medium", "size", "sampled", "encoded", "pooled", "temporal", "sound", "text"):
        table.add_column(name, justify="left" if name == "medium" else "right")
    table.add_column("in the prompt", justify="right")
    for medium, count in Counter(plan.request.media).items():
        table.add_row(*_row(medium, count))
    table.add_row("text and template", *[""] * 6, "", f"{plan.request.text:,}")
    table.add_section()
    table.add_row("prompt", *[""] * 7, f"{plan.request.prompt:,}")
    table.add_row("answer", *[""] * 7, f"{plan.request.output:,}")
    return table


def _row(medium: MediumTokens, count: int) -> list[str]:
    stages = medium.stages
    times = "" if count == 1 else f"{count} x "
    length = f" of {medium.seconds:g} s" if medium.seconds else ""
    width, height = medium.size
    numbers = [stages.encoded, stages.pooled, stages.temporal, stages.sound, stages.text]
    frames = f"{stages.sampled:,} frames" if medium.kind == "video" else ""
    return [
        f"{times}{_NAMES[medium.kind]}{length}",
        f"{width}x{height}" if width else "",
        frames,
        *(f"{number:,}" if number else "" for number in numbers),
        f"{stages.prompt * count:,}"
        + (f" (to {(stages.prompt + medium.later_text) * count:,})" if medium.later_text else ""),
    ]


def _request(plan: Plan) -> Table:
    table = Table(title="needs", title_justify="left")
    table.add_column("")
    table.add_column("one request", justify="right")
    table.add_column(f"all {plan.workload.concurrency}", justify="right")
    each = request_bytes(plan.facts, plan.workload, plan.request)
    count = plan.workload.concurrency
    items, embeddings = len(plan.request.items), plan.request.embeddings
    width = plan.encoder_cache_bytes // plan.step.encoder_tokens
    table.add_row("KV blocks", f"{plan.blocks:,}", f"{plan.blocks * count:,}")
    rows = {
        f"KV cache{' (each GPU)' if plan.site.tp > 1 else ''}": plan.blocks * plan.block_bytes,
        "encoder outputs (host tier)": embeddings * width,
        "inputs of encoders": each.inputs,
        "frames and sound": each.decoded,
        "encoded files": each.files,
    }
    for name, num_bytes in rows.items():
        table.add_row(name, _size(num_bytes), _size(num_bytes * count))
    table.add_row("mm items", f"{items:,}", f"{items * count:,}")
    table.add_row("context", f"{plan.context_needed:,} tokens", "")
    return table


def _memory(title: str, parts: Sequence[Part]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("follows from", overflow="fold")
    for part in parts:
        table.add_row(part.name, _size(part.num_bytes), part.why)
    table.add_section()
    table.add_row("together", _size(total(parts)), "")
    return table


def _verdict(console: Console, plan: Plan, found: Sequence[Lever]) -> None:
    fits = plan.concurrency_that_fits
    if plan.fits:
        console.print(
            f"[green]It fits:[/] {plan.workload.concurrency} requests at a time; the KV cache "
            f"holds {fits}.",
            highlight=False,
        )
        return
    for problem in plan.problems():
        console.print(f"[red]It does not fit.[/] {problem}.", highlight=False)
    if not found:
        console.print(
            "No single change of frames, resolution, reduction, tp or context makes it fit."
        )
        return
    table = Table(title="each of these alone makes it fit", title_justify="left")
    for name in ("change", "from", "to", "option"):
        table.add_column(name)
    for name in ("prompt", "blocks", "fit at a time"):
        table.add_column(name, justify="right")
    for lever in found:
        table.add_row(
            lever.name,
            lever.before,
            lever.after,
            lever.setting,
            f"{lever.plan.request.prompt:,}",
            f"{lever.plan.blocks:,}",
            f"{lever.plan.concurrency_that_fits:,}",
        )
    console.print(table)


def _size(num_bytes: int) -> str:
    if abs(num_bytes) >= _GIB:
        return f"{num_bytes / _GIB:,.2f} GiB"
    if abs(num_bytes) >= 10 << 20:
        return f"{num_bytes / (1 << 20):,.0f} MiB"
    return f"{num_bytes / (1 << 20):,.1f} MiB"


def as_dict(plan: Plan, found: Sequence[Lever], expected: Expected | None) -> dict[str, Any]:
    """A plan as plain values.

    Args:
        plan: The plan.
        found: What makes it fit, if it does not.
        expected: What clients see; None if that is not known.
    """
    request = plan.request
    return {
        "model": plan.facts.name,
        "gpu": plan.site.gpu.name,
        "tp": plan.site.tp,
        "dp": plan.site.dp,
        "fits": plan.fits,
        "problems": list(plan.problems()),
        "concurrency": plan.workload.concurrency,
        "concurrency_that_fits": plan.concurrency_that_fits,
        "request": {
            "prompt": request.prompt,
            "most_prompt": request.most_prompt,
            "text": request.text,
            "output": request.output,
            "embeddings": request.by_modality(),
            "mm_items": len(request.items),
            "kv_tokens": request.kv_tokens,
            "kv_blocks": plan.blocks,
            "kv_bytes": plan.blocks * plan.block_bytes,
            "media": [_medium(medium) for medium in request.media],
        },
        "delivery": {
            "max_frames": plan.delivery.max_frames,
            "min_frames": plan.delivery.min_frames,
            "frame_pixels": plan.delivery.frame_pixels,
            "reduction": words_of(plan.delivery.reduction),
        },
        "settings": {
            "max_model_len": plan.context,
            "max_num_seqs": plan.per_engine,
            "max_num_batched_tokens": plan.step.tokens,
            "block_size": plan.block_size,
            "kv_blocks": plan.kv_blocks,
        },
        "memory": {
            "engine": {part.name: part.num_bytes for part in plan.engine},
            "kv_cache": plan.kv_bytes,
            "api_server": {part.name: part.num_bytes for part in plan.front.memory},
            "machine": sum(part.num_bytes for part in plan.host),
        },
        "container": asdict(plan.container),
        "estimate": None
        if expected is None
        else {
            "source": expected.source,
            "figures": {name: values for name, *values in expected.rows()},
            "busy": expected.estimate.busy,
        },
        "levers": [
            {
                "name": lever.name,
                "option": lever.setting,
                "from": lever.before,
                "to": lever.after,
                "prompt": lever.plan.request.prompt,
                "concurrency_that_fits": lever.plan.concurrency_that_fits,
            }
            for lever in found
        ],
    }


def _medium(medium: MediumTokens) -> dict[str, Any]:
    stages = medium.stages
    return {
        "kind": medium.kind,
        "seconds": medium.seconds,
        "frame_size": list(medium.size),
        "sampled_frames": stages.sampled,
        "encoded_tokens": stages.encoded,
        "pooled_tokens": stages.pooled,
        "temporal_tokens": stages.temporal,
        "sound_tokens": stages.sound,
        "text_tokens": stages.text,
        "prompt_tokens": stages.prompt,
        "mm_items": len(medium.items),
    }
