"""Which decode workers of a pool get a GPU and which one, and for what they use it."""

from __future__ import annotations

import glob
import logging
import os
import threading
from collections.abc import Mapping

from vllm_mm_ext.config.media_settings import DecodeConfig
from vllm_mm_ext.media.decode.decoders.nvdec_device import VISIBLE_DEVICES
from vllm_mm_ext.media.types import DecodeResult, GpuRules

logger = logging.getLogger("vllm.mm_ext")


class Seat:
    """A worker's right to a GPU; the GPU's memory holds only so many workers.

    Attributes:
        device: The GPU, as ``CUDA_VISIBLE_DEVICES`` names it.
    """

    def __init__(self, device: str, seats: GpuSeats) -> None:
        self.device = device
        self._seats = seats
        self._held = True

    def release(self) -> None:
        """Give the seat back; again is no matter."""
        if self._held:
            self._held = False
            self._seats.give_back(self.device)


class GpuSeats:
    """Hands out seats, always on the GPU with the fewest taken. Safe from any thread.

    Args:
        devices: The GPUs, as ``CUDA_VISIBLE_DEVICES`` names them.
        per_device: Seats of each.
    """

    def __init__(self, devices: tuple[str, ...], per_device: int) -> None:
        self._taken = dict.fromkeys(devices, 0)
        self._per_device = per_device
        self._on_gpu = self._fallbacks = 0
        self._lock = threading.Lock()

    @classmethod
    def of_server(cls, per_device: int) -> GpuSeats:
        """Seats on the GPUs that this process sees; none where ``per_device`` is 0."""
        devices = visible_devices(os.environ) if per_device else ()
        if per_device and not devices:
            logger.warning("mm_ext: CUDA_VISIBLE_DEVICES names no GPU: the CPU decodes all videos.")
        return cls(devices, per_device)

    def take(self) -> Seat | None:
        """A seat, or None when all are taken."""
        with self._lock:
            device = min(self._taken, key=lambda name: self._taken[name], default=None)
            if device is None or self._taken[device] >= self._per_device:
                return None
            self._taken[device] += 1
        return Seat(device, self)

    def count(self, result: DecodeResult) -> None:
        """Count what a GPU did for a job, or failed to do; of failures, the first is logged."""
        with self._lock:
            self._on_gpu += result.decoder == "nvdec"
            self._fallbacks += bool(result.decoder_note)
            first = bool(result.decoder_note) and self._fallbacks == 1
        if first:
            logger.warning(
                "mm_ext: a video was decoded on the CPU instead of the GPU: %r. Further ones are "
                "counted in /mm_ext/stats (gpu_fallbacks); `vllm-mm doctor` says what GPUs can do.",
                result.decoder_note,
            )

    def stats(self) -> dict[str, int]:
        """``on_gpu``: jobs whose frames a GPU decoded; ``gpu_fallbacks``: jobs that it failed."""
        with self._lock:
            return {"on_gpu": self._on_gpu, "gpu_fallbacks": self._fallbacks}

    def give_back(self, device: str) -> None:
        """One seat on ``device`` is free again."""
        with self._lock:
            self._taken[device] -= 1


def gpu_rules(config: DecodeConfig) -> tuple[GpuRules, int]:
    """What the configuration says of GPUs: the rules of a job, and the seats on each GPU.

    There are no seats where no job may use one.
    """
    least = config.nvdec.from_megapixels.model_dump(exclude_none=True)
    wanted = config.backend == "nvdec" or (config.backend == "auto" and bool(least))
    rules = GpuRules(config.nvdec.memory_mb << 20, tuple(least.items()))
    return rules, config.nvdec.sessions if wanted else 0


def visible_devices(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of a server, as ``CUDA_VISIBLE_DEVICES`` would name each alone.

    Args:
        environ: The server's environment. Where it names no GPUs, the machine's device files are
            counted; where there are none either, the driver may still know a first GPU.
    """
    named = environ.get(VISIBLE_DEVICES)
    if named is None:
        return tuple(map(str, range(len(glob.glob("/dev/nvidia[0-9]*")) or 1)))
    devices = []
    for name in (part.strip() for part in named.split(",")):
        # As in CUDA: what follows a name that is not valid does not count.
        if not name or name.startswith("-"):
            break
        devices.append(name)
    return tuple(dict.fromkeys(devices))
