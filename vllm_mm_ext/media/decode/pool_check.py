"""Whether the decode workers of a pool can start and do their work, for health checks."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import time
import wave

from vllm_mm_ext.errors import BusyError, MediaError
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest

logger = logging.getLogger("vllm.mm_ext")

# What a worker may take for a file that takes milliseconds; the start of a worker takes 0.3 s of a
# core, and the cores may be full of decodes.
_LIMITS = DecodeLimits(timeout_s=4.0)
_REQUEST = DecodeRequest(probe_only=True, limits=_LIMITS)
# Who asks gets the last answer if there is no new one by then: the file may wait for a worker.
_WAIT_S = 1.0
# However often somebody asks, workers are asked no more often.
_FRESH_S = 1.0


def _short_sound() -> bytes:
    """A WAV file of 10 ms."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(160))
    return file.getvalue()


_SOUND = _short_sound()


class PoolCheck:
    """Asks a decode worker for the probe of a tiny file. Belongs to one event loop.

    Args:
        pool: Whose workers.
    """

    def __init__(self, pool: DecodePool) -> None:
        self._pool = pool
        self._asking: asyncio.Task[str | None] | None = None
        self._found: str | None = None
        self._until = 0.0

    async def problem(self) -> str | None:
        """Why no worker can decode at present, in words; None if one can.

        It takes a second at most. While all workers have jobs, each of which has a limit on its
        time, the last answer stands. All who ask at the same time, or within a second, share one.
        """
        if self._asking is None:
            if time.monotonic() < self._until:
                return self._found
            self._asking = asyncio.create_task(self._ask())
        asking = self._asking
        done, _ = await asyncio.wait([asking], timeout=_WAIT_S)
        return asking.result() if done else self._found

    async def _ask(self) -> str | None:
        try:
            found = await self._probe()
        finally:
            self._asking = None
        if found != self._found:
            if found is None:
                logger.info("mm_ext: decode workers work again")
            else:
                logger.error("mm_ext: no decode worker can work: %s", found)
        self._found, self._until = found, time.monotonic() + _FRESH_S
        return found

    async def _probe(self) -> str | None:
        try:
            media = os.memfd_create("mm_ext-check", os.MFD_CLOEXEC)
            try:
                os.write(media, _SOUND)
                await self._pool.run(media, _REQUEST)
            finally:
                os.close(media)
        except OSError as error:
            # Processes, memory or descriptors are short. The error's text may name paths.
            return f"A worker cannot start ({error.strerror})."
        except BusyError as error:
            return error.message
        except MediaError as error:
            # The file is in order.
            return f"A worker failed ({error.code}): {error.message}"
        return None
