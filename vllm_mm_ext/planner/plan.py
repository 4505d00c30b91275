"""A plan: the settings of a server for a workload, what each request needs, and what fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_mm_ext.config.media_settings import MAX_OUTPUT_MB
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.planner.delivery import MAX_FRAMES, Delivery, frames_asked
from vllm_mm_ext.planner.front_end import FrontEnd, front_end
from vllm_mm_ext.planner.gpu_facts import GIB, Site
from vllm_mm_ext.planner.memory_parts import (
    Part,
    Step,
    encoder_cache_bytes,
    engine_parts,
    total,
    warm_up_peak,
)
from vllm_mm_ext.planner.model_facts import ModelFacts
from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.workload import Workload

# Tokens that the front-end takes a chat template to add at most (``request/conversation.py``), and
# the share of the context that videos may take when they are first sent (``quality.budget``).
_TEMPLATE_TOKENS = 48 + 12
_TEMPLATE_TOKENS_PER_PART = 4
_CONTEXT_SHARE = 0.8
# ``--max-model-len`` is a multiple of this.
CONTEXT_UNIT = 1024
# Tokens of a step: a whole prompt, if no more than the last of these.
_GPU_STEP = (2048, 16_384)
_CPU_STEP = (2048, 8192)
# Share of a GPU that vLLM takes by default, which leaves room for what torch does not report.
_GPU_SHARE = 0.9
# Of a worker's memory on the host, beside what a process without a GPU takes. Not measured.
_CUDA_HOST_GIB = 4
_GPU_BLOCK, _CPU_BLOCK = 16, 32
# A block that vLLM never gives out.
_NULL_BLOCKS = 1

Count = Callable[[Workload, Delivery], RequestTokens]


@dataclass(frozen=True)
class Server:
    """What the model and the plugin's settings say of a server.

    Attributes:
        segment_tokens: ``segments.tokens``.
        encoder_max_patches: ``compression.encoder_max_patches``.
        resizable: Frames have a size that a setting bounds.
        told_times: The model is told when frames are shown, so they may be unevenly spaced.
        frame_multiple: Frames of a temporal patch.
        hears_video: The model hears the sound of videos.
        largest_item: Embeddings of the largest mm item that vLLM admits by the model's limits.
        warm_up: Bytes of the pictures and samples with which vLLM warms the processor up.
        default_reduction: The token reduction of a server that is told none.
    """

    segment_tokens: int
    encoder_max_patches: int
    resizable: bool
    told_times: bool
    frame_multiple: int
    hears_video: bool
    largest_item: int
    warm_up: int
    default_reduction: Reduction


@dataclass(frozen=True)
class Container:
    """What a container is to be given.

    Attributes:
        memory_gib: Limit of its memory in GiB, ``/dev/shm`` included: a quarter more than the plan
            counts, for decode workers (0.1 GB each for 720p, 0.2 for 1080p) and Python, and for
            each GPU an allowance for what CUDA takes on the host.
        shm_gib: Size of ``/dev/shm`` in GiB: the host tier of the encoder cache, and 1 GiB for
            the queues of vLLM's processes.
        cores: CPU cores.
    """

    memory_gib: int
    shm_gib: int
    cores: int

    def __str__(self) -> str:
        return (
            f"A container needs {self.memory_gib} GiB of memory, of which /dev/shm may take "
            f"{self.shm_gib} GiB, and {self.cores} cores."
        )


@dataclass(frozen=True)
class Plan:
    """Settings for a workload, and what they need.

    Attributes:
        facts, site, server, workload: What was planned for.
        delivery: What the server makes of each video.
        request: Tokens of one request.
        block_size: Tokens of a KV block.
        context: ``--max-model-len``.
        context_asked: The context that the user asked for; None for as much as is needed.
        context_needed: Tokens of context that a request needs for its videos to stay as planned.
        step: What bounds a step.
        blocks: KV blocks of one request, wherever in its videos the frames are.
        block_bytes: Bytes of a block on each GPU.
        kv_bytes: Bytes of the KV cache on each GPU.
        engine: Memory of each GPU, or of the engine's processes on a CPU, without the KV cache.
        front: The API server; each replica has one.
    """

    facts: ModelFacts
    site: Site
    server: Server
    workload: Workload
    delivery: Delivery
    request: RequestTokens
    block_size: int
    context: int
    context_asked: int | None
    context_needed: int
    step: Step
    blocks: int
    block_bytes: int
    kv_bytes: int
    engine: tuple[Part, ...]
    front: FrontEnd

    @property
    def per_engine(self) -> int:
        """Requests that one replica runs at a time."""
        return math.ceil(self.workload.concurrency / self.site.dp)

    @property
    def kv_blocks(self) -> int:
        """Blocks of one replica's KV cache that requests can have."""
        return max(0, self.kv_bytes // self.block_bytes - _NULL_BLOCKS)

    @property
    def concurrency_that_fits(self) -> int:
        """Requests whose KV fits at a time, on all replicas together."""
        return self.kv_blocks // self.blocks * self.site.dp

    @property
    def encoder_cache_bytes(self) -> int:
        """Bytes of the device tier of the encoder cache."""
        return encoder_cache_bytes(self.facts, self.step.encoder_tokens)

    @property
    def host_tier_bytes(self) -> int:
        """Bytes of the host tier of the encoder cache: the media of all requests at a time."""
        return encoder_cache_bytes(self.facts, self.request.embeddings * self.per_engine)

    @property
    def kv(self) -> Part:
        """The KV cache of each GPU, or of the engine on a CPU."""
        blocks = f"{self.kv_blocks:,} blocks of {self.block_size} tokens"
        return Part("KV cache", self.kv_bytes, blocks)

    @property
    def host(self) -> tuple[Part, ...]:
        """Memory of the machine.

        An API server may work on as much as its media budget beside what the workload keeps in its
        caches: other requests may come than the planned ones.
        """
        site, front = self.site, self.front
        working = front.in_flight_mb << 20
        budget = Part("media that are worked on", working, "media.cache.in_flight_mb")
        if site.gpu.is_cpu:
            return (*front.memory, budget, *self.engine, self.kv)
        # With one GPU the core is the worker.
        processes = site.tp + 1 if site.tp > 1 else 1
        each = [
            *front.memory,
            budget,
            Part(
                "Python and vLLM of the engine",
                processes * site.process_bytes,
                "core and workers, as this process has loaded",
            ),
            Part("encoder cache, host tier", self.host_tier_bytes, "encoder_cache.host_mb"),
            Part(
                "inputs of encoders",
                round(front.processor_cache_gb * GIB),
                "--mm-processor-cache-gb",
            ),
        ]
        if site.tp > 1:
            inputs = site.tp * round(front.processor_cache_gb * GIB)
            each.append(
                Part("the same at the workers", inputs, "as sent to each, until a request ends")
            )
        # vLLM starts an API server for each replica, each with caches of its own.
        return tuple(replace(part, num_bytes=part.num_bytes * site.dp) for part in each)

    @property
    def container(self) -> Container:
        """What a container that serves all replicas is to be given."""
        site = self.site
        each, shm = (1, 0) if site.gpu.is_cpu else (_CUDA_HOST_GIB, self.host_tier_bytes * site.dp)
        memory = 1.25 * total(self.host) / GIB + each * site.tp * site.dp
        return Container(math.ceil(memory), math.ceil(shm / GIB + 1.0), site.cores)

    @property
    def fits(self) -> bool:
        """Whether the workload runs as stated."""
        return not self.problems()

    def problems(self) -> tuple[str, ...]:
        """What keeps the workload from running as stated; each names need and limit."""
        found = []
        if self.context_needed > self.context:
            found.append(
                f"context: a request needs {self.context_needed:,} tokens, the context has "
                f"{self.context:,}"
            )
        if self.concurrency_that_fits < self.workload.concurrency:
            found.append(
                f"KV cache: {self.workload.concurrency} requests of {self.blocks:,} blocks need "
                f"{self.blocks * self.per_engine * self.block_bytes / GIB:.1f} GiB on each GPU, "
                f"{max(0, self.kv_bytes) / GIB:.1f} GiB are left: "
                f"{self.concurrency_that_fits} fit at a time"
            )
        longest = -(-self.context // self.block_size)
        if longest > self.kv_blocks:
            found.append(
                f"KV cache: vLLM does not start without room for one request as long as the "
                f"context; {self.context:,} tokens need {longest:,} blocks, {self.kv_blocks:,} are "
                "left"
            )
        if self.front.output_mb > MAX_OUTPUT_MB:
            found.append(
                f"frames: those of a video take {self.front.output_mb:,} MiB, of which "
                f"media.decode.max_output_mb allows {MAX_OUTPUT_MB:,}"
            )
        host = total(self.host)
        if self.site.host_memory is not None and host > self.site.host_memory:
            found.append(
                f"memory of the machine: {host / GIB:.1f} GiB are needed, it has "
                f"{self.site.host_memory / GIB:.1f} GiB"
            )
        return tuple(found)


def make_plan(
    facts: ModelFacts,
    site: Site,
    server: Server,
    workload: Workload,
    delivery: Delivery,
    count: Count,
    *,
    context: int | None = None,
) -> Plan:
    """Plan a server for a workload.

    Args:
        facts: The model.
        site: The machine.
        server: What model and settings say of the server.
        workload: What is asked of it.
        delivery: What it makes of videos.
        count: Counts the tokens of a request.
        context: ``--max-model-len``; None for as much as the workload needs.
    """
    request = count(workload, delivery)
    needed = _context_needed(workload, request)
    length = context or min(facts.max_context, _rounded(needed, CONTEXT_UNIT))
    per_engine = math.ceil(workload.concurrency / site.dp)
    is_cpu = site.gpu.is_cpu
    least, most = _CPU_STEP if is_cpu else _GPU_STEP
    # A step has a token of every request that runs at least; vLLM does not start with fewer.
    tokens = max(per_engine, min(most, max(least, 1 << (request.prompt - 1).bit_length())))
    step = Step(
        tokens=tokens,
        sequences=per_engine,
        encoder_tokens=max(tokens, server.largest_item, *(i.embeddings for i in request.items), 0),
        encoder_inputs=server.encoder_max_patches,
    )
    block_size = _CPU_BLOCK if is_cpu else _GPU_BLOCK
    block_bytes = facts.kv_bytes_per_token(site.tp) * block_size
    blocks = request.most_kv_blocks(block_size)
    warm_up = warm_up_peak(facts, request, step, server.warm_up, server.largest_item)
    engine = engine_parts(facts, site, workload, request, step, warm_up)
    if is_cpu:
        # vLLM does not start without room for one request as long as the context.
        held = max(blocks * per_engine, -(-length // block_size))
        kv_bytes = (held + _NULL_BLOCKS) * block_bytes
    else:
        kv_bytes = int(site.gpu.memory_bytes * _GPU_SHARE) - total(engine)
    return Plan(
        facts=facts,
        site=site,
        server=server,
        workload=workload,
        delivery=delivery,
        request=request,
        block_size=block_size,
        context=length,
        context_asked=context,
        context_needed=needed,
        step=step,
        blocks=blocks,
        block_bytes=block_bytes,
        kv_bytes=kv_bytes,
        engine=engine,
        front=front_end(
            facts,
            replace(workload, concurrency=per_engine),
            request,
            site.process_bytes,
            warm_up,
            max(1, site.cores // site.dp),
        ),
    )


def asked_delivery(workload: Workload, delivery: Delivery, frame_multiple: int) -> Delivery:
    """The delivery with as many frames as the longest video of the workload asks for."""
    asked = max((frames_asked(video) for video in workload.videos), default=1)
    frames = min(MAX_FRAMES, max(asked, frame_multiple))
    return Delivery(
        max_frames=frames,
        min_frames=min(delivery.min_frames, frames),
        frame_pixels=delivery.frame_pixels,
        reduction=delivery.reduction,
    )


def _context_needed(workload: Workload, request: RequestTokens) -> int:
    """Context with which a request runs and its videos are not lowered to fit their share."""
    videos = sum(
        medium.stages.prompt + medium.later_text
        for medium in request.media
        if medium.kind == "video"
    )
    around = _TEMPLATE_TOKENS + _TEMPLATE_TOKENS_PER_PART * (len(request.media) + 1)
    return max(
        request.most_prompt + workload.output,
        math.ceil(videos / _CONTEXT_SHARE),
        videos + workload.text + around + workload.output,
    )


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
