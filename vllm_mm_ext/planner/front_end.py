"""The API server of a plan: its caches, its memory, and the cores that decoding media takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_mm_ext.config.media_settings import DecodeConfig
from vllm_mm_ext.media.decode.pool import MAX_DEFAULT_WORKERS
from vllm_mm_ext.planner.memory_parts import (
    PREPROCESSING_COPIES,
    Part,
    frame_bytes,
    request_bytes,
)
from vllm_mm_ext.planner.model_facts import ModelFacts
from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.workload import Image, Workload

MIB = 1 << 20


@dataclass(frozen=True)
class FrontEnd:
    """Settings and memory of the API server.

    Attributes:
        encoded_mb, decoded_mb, in_flight_mb: As in ``media.cache``, MiB.
        processor_cache_gb: ``--mm-processor-cache-gb``.
        workers: Decode workers.
        threads: Threads of each.
        output_mb, worker_memory_mb: ``max_output_mb`` and ``worker_memory_mb`` of ``media.decode``,
            MiB: more than their defaults where the frames of a video take more.
        request_bytes: Bytes of the decoded media of one request.
        memory: Memory of the API server.
    """

    encoded_mb: int
    decoded_mb: int
    in_flight_mb: int
    processor_cache_gb: float
    workers: int
    threads: int
    output_mb: int
    worker_memory_mb: int
    request_bytes: int
    memory: tuple[Part, ...]


def front_end(
    facts: ModelFacts,
    workload: Workload,
    request: RequestTokens,
    process_bytes: int,
    warm_up: int,
    cores: int,
) -> FrontEnd:
    """Plan the API server.

    Every cache holds the media of all requests that run, so that the next turn of each finds them.

    Args:
        facts: The model.
        workload: What is asked of this API server.
        request: Tokens of one request.
        process_bytes: Memory of the process before it serves.
        warm_up: Most bytes that vLLM's warm-up of the processor takes.
        cores: CPU cores that it may take.
    """
    count = workload.concurrency
    each = request_bytes(facts, workload, request)
    encoded = _mib(each.files * count)
    decoded = _mib(each.decoded * count)
    in_flight = max(_LEAST_IN_FLIGHT, _mib((each.files + each.decoded) * count))
    media = len(workload.videos) + len(workload.audios)
    workers = max(1, min(MAX_DEFAULT_WORKERS, cores, media * count))
    usual = DecodeConfig()
    largest = max((frame_bytes(medium) for medium in request.media), default=0)
    output = max(usual.max_output_mb, _mib(largest))
    preprocessing = PREPROCESSING_COPIES * each.inputs
    sound = _SOUND_BYTES if request.has_sound else 0
    # vLLM takes a request's items from the cache only if they leave as much again free.
    cache = max(2 * each.inputs, each.inputs * count)
    return FrontEnd(
        encoded_mb=encoded,
        decoded_mb=decoded,
        in_flight_mb=in_flight,
        processor_cache_gb=math.ceil(cache / (1 << 30) * 100) / 100,
        workers=workers,
        threads=max(1, min(4, cores // workers)),
        output_mb=output,
        # A worker has the frames in its address space.
        worker_memory_mb=usual.worker_memory_mb + output - usual.max_output_mb,
        request_bytes=each.decoded + sum(_image_bytes(image) for image in workload.images),
        memory=(
            Part(
                "Python, vLLM and the processor",
                process_bytes + _GROWTH,
                "as this process has loaded, and the server's routes",
            ),
            Part("encoded files", each.files * count, "media.cache.encoded_mb"),
            Part("frames and sound", each.decoded * count, "media.cache.decoded_mb"),
            Part(
                "a request in preprocessing",
                preprocessing,
                "the encoder's inputs of one request, as they are made and as they are sent",
            ),
            Part(
                "sound in preprocessing",
                sound,
                "spectra, and what the C library keeps of them when they are freed",
            ),
            Part(
                "vLLM's warm-up",
                max(0, warm_up - preprocessing - sound - (each.files + each.decoded) * count),
                "before it serves, where serving takes less",
            ),
        ),
    )


# The media budget has room for a few ordinary files whatever the workload is.
_LEAST_IN_FLIGHT = 256
# What an API server loads beside the processor (``vllm-mm bench plan-memory``).
_GROWTH = 60 << 20
# As seen beside all other parts with sound of 3 to 40 s in a request (``vllm-mm bench
# plan-memory``).
_SOUND_BYTES = 160 << 20


def _image_bytes(image: Image) -> int:
    """Bytes that vLLM counts for an image, whatever the number of its channels."""
    return image.width * image.height * 4


def _mib(num_bytes: int) -> int:
    return max(16, math.ceil(num_bytes / MIB))
