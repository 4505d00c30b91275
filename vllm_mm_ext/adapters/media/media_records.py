"""Records of videos in the shared store: an encoder writes them, engines read them and decode less.

A record lies beside the encoder outputs, under the same bound and the same rules. It is a file like
theirs, so that the store knows whole files from broken ones.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import safetensors
import safetensors.numpy

from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.fleet.output_store import OutputStore
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.frontend import MediaFrontend
from vllm_mm_ext.media.record_reading import (
    holds_frames,
    name_for,
    recorded_video,
)
from vllm_mm_ext.media.recorded import RecordError, limits_key
from vllm_mm_ext.media.results import VideoResult
from vllm_mm_ext.media.types import DecodeLimits
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.request.context import EncodeJob, RequestContext

if TYPE_CHECKING:
    from vllm_mm_ext.adapters.runtime import Runtime

OUTCOMES: Final = ("recorded", "decoded", "decoded_later")
_NAME: Final = "record"
# Seconds between two looks for a record that an encoder is about to write, at least, and as a share
# of the time since the first look: long decodes are looked for less often.
_LOOK_S, _LOOK_SHARE = 0.02, 0.1
# Seconds in which one warning is enough.
_QUIET_S: Final = 30.0


class MediaRecords:
    """The records of the instances that share a store.

    Args:
        files: The shared store.
        plan: Digest of the plan that all of them have.
        limits: ``limits_key`` of this instance: one with others would decode something else.
        wait_s: Seconds for which a request waits for a record.

    Attributes:
        counts: Videos of requests for which an encoder was asked: taken by their record; decoded
            here, without one; and decoded after all, as an output was missing.
    """

    def __init__(self, files: OutputStore, plan: str, limits: str, wait_s: float) -> None:
        self._files = files
        self._made_for = f"{plan}|{limits}"
        self._wait_s = wait_s
        self._told_of_failure = False
        self._warned = -_QUIET_S
        self.counts = dict.fromkeys(OUTCOMES, 0)

    def write(self, name: str, record: bytes) -> None:
        """Have a record in the store.

        Args:
            name: Digest of the video's frames.
            record: Its bytes.
        """
        tensors = {_NAME: np.frombuffer(record, np.uint8)}

        def write(path: Path) -> None:
            safetensors.numpy.save_file(tensors, path)

        try:
            self._files.put(self._key(name), write)
            self._told_of_failure = False
        except OSError as error:
            # Who does not find it decodes the video.
            if not self._told_of_failure:
                logger.warning("mm_ext: records of videos cannot be stored: %s", error)
            self._told_of_failure = True

    def read(self, name: str) -> bytes | None:
        """The bytes of a record; None if it is not there."""
        key = self._key(name)
        if not self._files.has(key):
            return None
        try:
            found = safetensors.numpy.load_file(self._files.path(key))
            return bytes(found[_NAME])
        except FileNotFoundError:
            return None
        except (OSError, KeyError, safetensors.SafetensorError):
            self._drop(key)
            return None

    async def video(
        self, job: EncodeJob | None, frontend: MediaFrontend, ref: MediaRef, plan: VideoPlan
    ) -> VideoResult | None:
        """A video by its record, without frames; None if it is to be decoded.

        Args:
            job: What an encoder was asked for the request.
            frontend: Of this instance.
            ref: The media.
            plan: What the model gets of it.
        """
        if job is None or not job.takes_records or not (plan.recordable and ref.storable):
            return None
        if holds_frames(frontend, ref, plan):
            return None
        name = name_for(frontend, ref, plan)
        data = await self._awaited(name, job)
        if data is not None:
            try:
                found = recorded_video(frontend, ref, plan, data)
            except RecordError as error:
                self.warn(str(error))
                self._drop(self._key(name))
            else:
                job.used_records += 1
                self.counts["recorded"] += 1
                return found
        self.counts["decoded"] += 1
        return None

    def warn(self, why: str) -> None:
        """Say in the log why a video is decoded here, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self._warned >= _QUIET_S:
            self._warned = now
            logger.warning("mm_ext: a video that an encoder has decoded is decoded here: %s", why)

    async def _awaited(self, name: str, job: EncodeJob) -> bytes | None:
        since = time.monotonic()
        while True:
            waited_s = time.monotonic() - since
            # Asked first: what an encoder has done by then is there at the look that follows.
            goes_on = job.is_open and waited_s < self._wait_s
            found = await asyncio.to_thread(self.read, name)
            if found is None and job.is_open and not goes_on:
                # That was all the time there is for the encoder: the engine waits no more.
                job.name = None
            if found is not None or not goes_on:
                return found
            await asyncio.sleep(max(_LOOK_S, _LOOK_SHARE * waited_s))

    def _key(self, name: str) -> str:
        return f"record|{self._made_for}|{name}"

    def _drop(self, key: str) -> None:
        # What cannot be used must not stand in the way of another.
        with suppress(OSError):
            self._files.path(key).unlink(missing_ok=True)


async def recorded_or_decoded(
    context: RequestContext, runtime: Runtime, ref: MediaRef, plan: VideoPlan
) -> VideoResult:
    """A video by its record, where there is one, else decoded here.

    Raises:
        MediaError: The media cannot be served; the message names cause and limit.
    """
    if runtime.records is not None:
        found = await runtime.records.video(context.elsewhere, runtime.frontend, ref, plan)
        if found is not None:
            return found
    return await runtime.frontend.video(ref, plan)


def records_for(renderer: Any, limits: DecodeLimits, wait_s: float) -> MediaRecords | None:
    """The records of a renderer's instance; None where it shares no store.

    Args:
        renderer: vLLM's.
        limits: Of its decodes.
        wait_s: Seconds for which a request waits for a record.
    """
    # Not at the top: loaded in processes that have no vLLM configuration yet.
    from vllm_mm_ext.adapters.encoder_cache.instance_plan import kept_plan
    from vllm_mm_ext.adapters.encoder_cache.transport_options import (
        SHARED_STORE,
        shared_directory,
        store_bytes,
        transport_of,
    )
    from vllm_mm_ext.fleet.pairing import digest

    config = renderer.config
    plan = kept_plan(config.model_config)
    if plan is None or transport_of(config.ec_transfer_config) != SHARED_STORE:
        return None
    files = OutputStore(shared_directory(config), store_bytes(config))
    return MediaRecords(files, digest(plan), limits_key(limits), wait_s)
