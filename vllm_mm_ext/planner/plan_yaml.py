"""The ``--config`` file of a plan: each value with the reason for it as a comment."""

from __future__ import annotations

import json
import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

from vllm_mm_ext.config.media_settings import DecodeConfig
from vllm_mm_ext.planner.plan import Plan

_WIDTH = 100
_MANAGER = "vllm_mm_ext.encoder_cache.MMExtEncoderCacheManager"
_TRANSFER = {
    "ec_connector": "MMExtECConnector",
    "ec_role": "ec_both",
    "ec_connector_module_path": "vllm_mm_ext.encoder_cache",
}
# Past a quarter, and past a half, more requests than planned quality steps down.
_TIERS = (1.25, 1.5)
# Encoder work that waits is no reason to lower quality before requests wait as long as the
# scheduler lets them (``scheduler.aging_s``).
_BACKLOG_S = (30.0, 60.0)
_MIB = 1 << 20
# What the media of a request may take decoded, and vLLM's default for it. vLLM 0.32 has no such
# bound, and does not read the variable.
_BOUND, _USUAL_BOUND = "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES", 715_827_880


def plan_yaml(
    plan: Plan,
    *,
    command: str,
    file_name: str,
    mm_processor_kwargs: Mapping[str, Any],
) -> str:
    """Text of the file.

    Args:
        plan: The plan.
        command: The command line that made it.
        file_name: Name of the file, for the command that serves with it.
        mm_processor_kwargs: vLLM's ``--mm-processor-kwargs``.
    """
    page = _Page()
    _head(page, plan, command, file_name)
    _engine(page, plan)
    _media(page, plan, mm_processor_kwargs)
    page.say("Decodes first, encoder work apart, nobody is passed for long.")
    page.put("scheduler-cls", "vllm_mm_ext.scheduler.MMExtScheduler")
    # vLLM starts no EC connector in a server that takes no media.
    if plan.workload.has_media:
        page.say(
            "Encoder outputs that are evicted from the device are read back from host memory"
            + ("." if plan.site.gpu.is_cpu else " (/dev/shm must hold encoder_cache.host_mb).")
        )
        page.put_json("ec-manager-config", {"encoder_cache_manager_cls": _MANAGER})
        page.put_json("ec-transfer-config", _TRANSFER)
    _plugin(page.deeper("additional-config").deeper("mm_ext"), plan)
    return page.text()


def serve_command(plan: Plan, file_name: str) -> str:
    """The command line that serves a plan.

    Args:
        plan: The plan.
        file_name: Name of its file.
    """
    needed = math.ceil(plan.front.request_bytes / _MIB) * _MIB
    variables = f"{_BOUND}={needed} " if needed > _USUAL_BOUND else ""
    words = shlex.join(["vllm", "serve", plan.facts.name, "--config", file_name])
    return f"{variables}VLLM_PLUGINS=mm_ext {words}"


class _Page:
    """Lines of YAML with comments before them."""

    def __init__(self, lines: list[str] | None = None, indent: int = 0) -> None:
        self._lines = [] if lines is None else lines
        self._indent = " " * indent

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def say(self, reason: str) -> None:
        start = f"{self._indent}# "
        self._lines += textwrap.wrap(
            " ".join(reason.splitlines()),
            _WIDTH,
            initial_indent=start,
            subsequent_indent=start,
            break_long_words=False,
        )

    def command(self, text: str) -> None:
        # A line break in a value would end the comment.
        self._lines.append(f"{self._indent}#   {' '.join(text.splitlines())}")

    def put(self, key: str, value: object) -> None:
        shown = "" if value is None else f" {_shown(value)}"
        self._lines.append(f"{self._indent}{key}:{shown}")

    def put_json(self, key: str, value: Mapping[str, Any]) -> None:
        quoted = json.dumps(value).replace("'", "''")
        self._lines.append(f"{self._indent}{key}: '{quoted}'")

    def put_flow(self, key: str, **values: object) -> None:
        self.put(key, values)

    def deeper(self, key: str) -> _Page:
        """The inside of a mapping that begins here."""
        self.put(key, None)
        return _Page(self._lines, len(self._indent) + 2)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) else f"{value:.1f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_shown(one) for one in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(one)}' for key, one in value.items())}}}"
    text = str(value)
    if not isinstance(value, str):
        return text
    try:
        is_plain = yaml.safe_load(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        is_plain = False
    return text if is_plain else yaml.safe_dump(text, default_style='"', width=1 << 20).strip()


def _head(page: _Page, plan: Plan, command: str, file_name: str) -> None:
    request, site = plan.request, plan.site
    page.say(f"{plan.facts.name} on {_machine(plan)}. Written by")
    page.command(command)
    page.say("and served by")
    page.command(serve_command(plan, file_name))
    kinds = {"video": "video", "audio": "sound", "image": "images"}
    parts = [f"{count:,} of {kinds[kind]}" for kind, count in request.by_modality().items()]
    shown = f" ({', '.join(parts)})" if parts else ""
    page.say(
        f"A request has {request.prompt:,} prompt tokens{shown} and {request.output:,} of answer: "
        f"{plan.blocks:,} KV blocks, {plan.blocks * plan.block_bytes / 1e6:,.0f} MB"
        f"{' on each GPU' if site.tp > 1 else ''}. Planned are {plan.workload.concurrency} at a "
        f"time; the KV cache holds {plan.concurrency_that_fits}."
    )
    page.say(str(plan.container))


def _machine(plan: Plan) -> str:
    site = plan.site
    gpus = site.tp * site.dp
    if gpus == 1:
        return f"one {site.gpu.title}" if not site.gpu.is_cpu else "a CPU"
    return f"{gpus} x {site.gpu.title}, tp {site.tp}, dp {site.dp}"


def _engine(page: _Page, plan: Plan) -> None:
    facts, step, site = plan.facts, plan.step, plan.site
    page.put("model", facts.name)
    page.say("As the checkpoint says.")
    page.put("dtype", facts.dtype)
    if site.tp > 1:
        page.say(
            f"Weights of {facts.weight_bytes / 1e9:.1f} GB and KV are divided by {site.tp}; what "
            "is not divided is whole on each GPU."
        )
        page.put("tensor-parallel-size", site.tp)
    if site.dp > 1:
        page.say(f"Replicas; each runs {plan.per_engine} of the requests at a time.")
        page.put("data-parallel-size", site.dp)
    if site.gpu.is_cpu:
        page.say("Memory was planned for a model that is not compiled.")
        page.put("enforce-eager", True)
        page.say(
            f"{plan.per_engine} requests of {plan.blocks:,} blocks of {plan.block_bytes:,} bytes, "
            "or one as long as the context, and the block that vLLM never gives out."
        )
        page.put("kv-cache-memory-bytes", plan.kv_bytes)
    else:
        parts = ", ".join(f"{part.name} {part.num_bytes / 1e9:.1f}" for part in plan.engine)
        page.say(
            f"vLLM's share of {site.gpu.memory_bytes / 1e9:.1f} GB; the rest is for what torch "
            f"does not report. Of the share, in GB: {parts}, KV cache {plan.kv_bytes / 1e9:.1f}."
        )
        page.put("gpu-memory-utilization", 0.9)
    page.say("Tokens of a KV block, on which the plan's counts of blocks rest.")
    page.put("block-size", plan.block_size)
    page.say(
        f"A request needs {plan.context_needed:,}: its tokens, and enough that its videos are not "
        "lowered to fit their share of the context (quality.budget.context_share). What is more is "
        "for further turns."
    )
    page.put("max-model-len", plan.context)
    page.say("The planned requests at a time; one more waits until one of them ends.")
    page.put("max-num-seqs", plan.per_engine)
    whole = step.tokens >= plan.request.prompt
    page.say(
        "Tokens of one step: "
        + ("a whole prompt" if whole else "a part of a prompt, to bound memory and the step's time")
        + ". Videos are encoded in segments, so none is too large for it."
    )
    page.put("max-num-batched-tokens", step.tokens)


def _media(page: _Page, plan: Plan, mm_processor_kwargs: Mapping[str, Any]) -> None:
    work = plan.workload
    limits = {"video": len(work.videos), "audio": len(work.audios), "image": len(work.images)}
    if plan.server.hears_video and any(video.sound for video in work.videos):
        limits["audio"] = max(1, limits["audio"])
    known = {"video": plan.facts.vision, "image": plan.facts.vision, "audio": plan.facts.audio}
    limits = {kind: count for kind, count in limits.items() if count or known[kind] is not None}
    page.say("What a planned request holds; more of it has no room in the plan.")
    page.put_json("limit-mm-per-prompt", limits)
    if mm_processor_kwargs:
        sizes = sorted({medium.size for medium in plan.request.media if medium.kind == "video"})
        shown = ", ".join(f"{width}x{height}" for width, height in sizes)
        page.say(f"With it the frames of the plan have {shown or 'their size'} pixels.")
        page.put_json("mm-processor-kwargs", mm_processor_kwargs)
    page.say("Inputs of the encoders of all planned requests, for their next turns.")
    page.put("mm-processor-cache-gb", plan.front.processor_cache_gb)
    page.say("The next turn of a conversation finds its KV.")
    page.put("enable-prefix-caching", True)


def _plugin(page: _Page, plan: Plan) -> None:
    front, work, delivery = plan.front, plan.workload, plan.delivery
    share = plan.request.embeddings * plan.per_engine / max(1, plan.kv_blocks * plan.block_size)
    if work.has_media:
        page.say(
            f"The device tier has the {plan.step.encoder_tokens:,} embeddings of a step "
            f"({plan.encoder_cache_bytes / 1e6:,.0f} MB), as vLLM's own cache; the host tier has "
            "those of all planned requests."
        )
        host_mb = max(1, math.ceil(plan.host_tier_bytes / _MIB))
        page.put_flow("encoder_cache", device_mb=0, host_mb=host_mb)
        page.say(
            "Media of all planned requests may stay in the KV cache when nobody uses them; who "
            "needs the blocks takes them."
        )
        page.put_flow("kv", max_visual_cache_share=min(1.0, math.ceil(share * 100) / 100))
    if not (delivery.reduction.is_identity and plan.server.default_reduction.is_identity):
        page.say(
            "Without it the checkpoint's own would make tokens of videos fewer."
            if delivery.reduction.is_identity
            else "Tokens of videos are made fewer by it."
        )
        changed = delivery.reduction.model_dump(exclude_defaults=True)
        page.put_flow("compression", reduction=changed)
    if work.has_media:
        page.say(
            "All slots are for requests with media; raise this and max-num-seqs by one for each "
            "slot that only text may have."
        )
        page.put_flow("scheduler", text_slots=0)
    _quality(page, plan)
    media = page.deeper("media")
    if work.videos:
        longest = max(work.videos, key=lambda video: video.seconds)
        media.say(
            f"{delivery.max_frames} frames are {delivery.max_frames / longest.fps:g} s at "
            f"{longest.fps:g} a second. "
            + (
                "By content: more where something happens."
                if plan.server.told_times
                else "Evenly: the model is told no frame times."
            )
        )
        side = math.isqrt(delivery.frame_pixels)
        media.put_flow(
            "sampling",
            policy="adaptive" if plan.server.told_times else "uniform",
            fps=float(longest.fps),
            max_frames=delivery.max_frames,
            min_frames=delivery.min_frames,
            **({"resolution": side} if side else {}),
        )
    if work.videos or work.audios:
        large: dict[str, int] = {}
        reason = f"Planned on {plan.site.cores} cores."
        if front.output_mb > DecodeConfig().max_output_mb:
            large = {
                "max_output_mb": front.output_mb,
                "worker_memory_mb": front.worker_memory_mb,
            }
            reason += f" The frames of a video take up to {front.output_mb:,} MiB."
        media.say(reason)
        media.put_flow("decode", workers=front.workers, threads=front.threads, **large)
    media.say(
        "Files, frames and sound of all planned requests: kept for their next turns, and as much "
        "again while they are worked on."
    )
    media.put_flow(
        "cache",
        encoded_mb=front.encoded_mb,
        decoded_mb=front.decoded_mb,
        in_flight_mb=front.in_flight_mb,
    )


def _quality(page: _Page, plan: Plan) -> None:
    count = plan.per_engine
    # One request more than planned waits, and changes nothing.
    batch = [max(count + 2 + step, math.ceil(count * tier)) for step, tier in enumerate(_TIERS)]
    planned = plan.blocks * count / max(1, plan.kv_blocks)
    kv = max(0.8, math.ceil((planned + 0.05) * 20) / 20)
    page.say(
        f"The planned {count} requests have full quality; it steps down when {batch[0]}, and when "
        f"{batch[1]} are there, or encoder work waits for longer than scheduler.aging_s."
    )
    inner = page.deeper("quality")
    inner.put_flow(
        "tiers",
        batch=batch,
        load=[round(value / count, 2) for value in batch],
        kv=[round(kv, 2), round(kv + 0.1, 2)],
        backlog_s=list(_BACKLOG_S),
    )
