"""The front-end turns media into sampled frames and waveforms, each of them once.

All requests to an engine that one process renders share a front-end: concurrent requests for one
video wait for one decode, and later requests find its frames in the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from blake3 import blake3

from vllm_mm_ext.config.media_settings import MediaConfig
from vllm_mm_ext.config.root import MIB
from vllm_mm_ext.errors import NoSuchStreamError
from vllm_mm_ext.media.audio import waveforms as audio_ops
from vllm_mm_ext.media.audio.stream_choice import chosen_audio
from vllm_mm_ext.media.cache import ByteBudgetCache, SingleFlight
from vllm_mm_ext.media.decode.gpu_seats import gpu_rules
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_lease import Lease
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.job_rules import decode_limits, picture_rules
from vllm_mm_ext.media.output_bytes import audio_bytes, claimed_audio_bytes, frame_bytes
from vllm_mm_ext.media.payload import SampledFrames, Waveform, reduced_digest
from vllm_mm_ext.media.recorded import DELIVERED, Delivered, limits_key
from vllm_mm_ext.media.results import (
    AudioResult,
    VideoResult,
    key_of,
    memory_of,
    window_digest,
)
from vllm_mm_ext.media.sizing import is_pinned
from vllm_mm_ext.media.span import info_of
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import (
    DecodeRequest,
    MediaInfo,
    SamplingSpec,
    SizeRule,
)
from vllm_mm_ext.media.video_plan import VideoPlan

__all__ = ["AudioResult", "MediaFrontend", "VideoPlan", "VideoResult"]

# Each remembered item holds up to two memory mappings, of which Linux allows a process 65530.
_MAX_DECODED = 4096

# Probes remembered; each is a few hundred bytes.
_MAX_PROBED = 4096
# Digests of windows remembered, about 300 bytes each.
_MAX_WINDOWS = 1 << 14
# Packet tables of probes remembered: about 30 bytes a frame of the source, 6 MB for two hours.
_MAX_TABLE_BYTES = 64 * MIB


class MediaFrontend:
    """Decodes and remembers media for one engine.

    Args:
        config: The ``media`` section of the plugin's configuration.
        traits: What the served model wants.
        max_pixels: vLLM's own ceiling on the pixels of a frame, 0 or less for none.
        max_audio_s: vLLM's own ceiling on decoded audio in seconds.
        max_audio_bytes: vLLM's own ceiling on decoded audio in bytes, all channels together.
    """

    def __init__(
        self,
        config: MediaConfig,
        traits: ModelTraits,
        *,
        max_pixels: int,
        max_audio_s: float,
        max_audio_bytes: int,
    ) -> None:
        self.config = config
        self.traits = traits
        decode = config.decode
        self.gpu, sessions = gpu_rules(decode)
        self.pool = DecodePool(decode.workers, decode.threads, gpu_sessions=sessions)
        self.cache: ByteBudgetCache[str, VideoResult | AudioResult] = ByteBudgetCache(
            config.cache.decoded_mb * MIB,
            lambda value: value.nbytes,
            max_entries=_MAX_DECODED,
            lease_of=lambda value: value.lease,
        )
        self._video_flights: SingleFlight[str, VideoResult] = SingleFlight()
        self._audio_flights: SingleFlight[str, AudioResult] = SingleFlight()
        self._probed: ByteBudgetCache[str, MediaInfo] = ByteBudgetCache(_MAX_PROBED, lambda _: 1)
        # What a probe read of all packets is there for the decode that follows it.
        self._tables: ByteBudgetCache[str, MediaInfo] = ByteBudgetCache(
            _MAX_TABLE_BYTES,
            lambda info: 0 if info.packets is None else info.packets.nbytes,
            max_entries=_MAX_PROBED,
        )
        # What the spans of videos show, by the key of their decode.
        self._windows: ByteBudgetCache[str, str] = ByteBudgetCache(_MAX_WINDOWS, lambda _: 1)
        self._probe_flights: SingleFlight[str, MediaInfo] = SingleFlight()
        self.limits = decode_limits(
            config, max_pixels=max_pixels, max_audio_s=max_audio_s, max_audio_bytes=max_audio_bytes
        )
        self.picture = picture_rules(config)

    @property
    def size_rule(self) -> SizeRule:
        """Size rule for frames under this configuration."""
        rule = replace(self.traits.size_rule, max_frame_pixels=self.config.sampling.frame_pixels)
        return rule if self.config.resize == "target" else SizeRule()

    @property
    def wants_audio_in_video(self) -> bool:
        """Whether videos are delivered with their sound."""
        return self.traits.hears_video and self.config.audio.in_video == "auto"

    async def probe(
        self, ref: MediaRef, video_stream: int | None = None, *, sound_alone: bool = False
    ) -> MediaInfo:
        """Return what the container and its first picture say, without the packet table.

        Args:
            ref: The media.
            video_stream: As in ``SamplingSpec``.
            sound_alone: Do not look at the pictures, for media that are only heard.

        Raises:
            MediaError: It is no readable media, lacks the stream, or is past a limit.
        """
        key = _probe_key(ref, "sound" if sound_alone else video_stream)
        found = self._probed.get(key)
        if found is None:
            ref = await ref.opened()
            found = self._probed.get(key)
        if found is not None:
            return found

        async def read() -> MediaInfo:
            blob = await ref.open()
            request = DecodeRequest(
                sampling=None if sound_alone else SamplingSpec(video_stream=video_stream),
                audio="required" if sound_alone else "none",
                probe_only=True,
                limits=self.limits,
                picture=self.picture,
            )
            done = await self.pool.run(blob.fd, request)
            info = replace(done.info, packets=None)
            if ref.storable:
                self._tables.put(key, done.info)
                self._probed.put(key, info)
            return info

        return await self._probe_flights.run(key, read, ref.claim)

    async def video(self, ref: MediaRef, plan: VideoPlan) -> VideoResult:
        """Return the sampled video, from the cache, a running decode, or a new one.

        Plans that differ in their reduction alone share one decode.

        Raises:
            MediaError: The media cannot be served; the message names cause and limit.
        """
        key = self.video_key(ref, plan)
        found = self.cache.get(key)
        if found is None:
            ref = await ref.opened()
            found = self._decoded_meanwhile(key)
        if isinstance(found, VideoResult):
            result = replace(found, stages={}, cached=True)
        else:
            result = await self._video_flights.run(
                key, lambda: self._new_video(ref, plan, key), ref.claim
            )
        return replace(result, frames=result.frames.reduced(plan.reduction))

    async def window_key(self, ref: MediaRef, plan: VideoPlan) -> str:
        """A digest of what a model is shown of a span: its frames, their times and its sound.

        The digest does not depend on the file around the span: a recording that has grown at its
        end has the same ones before. It is known without decoding where the span was decoded
        before, and remembered longer than its frames.

        Args:
            ref: The media.
            plan: A plan with ``sampling.span``.

        Raises:
            MediaError: As ``video``.
        """
        known = self._windows.get(self.video_key(ref, plan))
        if known is None:
            return str((await self.video(ref, plan)).frames.digest)
        return reduced_digest(known, plan.reduction)

    def video_key(self, ref: MediaRef, plan: VideoPlan) -> str:
        """Key of a decode, and the digest of its frames (but of a span's)."""
        # The limits on a sound track decide how much of it is cut off.
        sound = f"{self.traits.audio_rate}|{self.limits.max_audio_s}"
        shown, heard = str(self.picture), sound if plan.audio else ""
        return key_of("video", ref.digest, plan.decode_key(), shown, heard)

    async def _new_video(self, ref: MediaRef, plan: VideoPlan, key: str) -> VideoResult:
        result = await self._decode_video(ref, plan, key)
        if ref.storable:
            if plan.sampling.span is None:
                self._probed.put(_probe_key(ref, plan.sampling.video_stream), result.info)
            else:
                self._windows.put(key, str(result.frames.digest))
            self.cache.put(key, result)
        return result

    async def audio(self, ref: MediaRef, stream: int | None = None) -> AudioResult:
        """Return the media's sound as mono at the model's rate.

        Args:
            ref: The media.
            stream: Number of the audio stream, from 0; None for the configured one.

        Raises:
            MediaError: There is no sound, it is too long, or it cannot be decoded.
        """
        stream = self.config.audio.audio_stream if stream is None else stream
        rate, limits = str(self.traits.audio_rate), str(self.limits)
        key = key_of("audio", ref.digest, rate, limits, str(stream))
        found = self.cache.get(key)
        if found is None:
            ref = await ref.opened()
            found = self._decoded_meanwhile(key)
        if isinstance(found, AudioResult):
            return replace(found, stages={}, cached=True)

        async def decode() -> AudioResult:
            blob = await ref.open()
            info = await self.probe(ref, sound_alone=True)
            request = DecodeRequest(
                audio="required", limits=self.limits, info=info, audio_stream=stream
            )
            lease, sized = await self._room(ref, blob, info, request)
            try:
                done = await self.pool.run(blob.fd, request, sized)
                assert done.audio is not None  # The job refuses media without sound.
                waveform, seconds = await self._resample(done.audio, done.audio_rate, key)
                lease.follow(memory_of(waveform))
            except BaseException:
                lease.release()
                raise
            stages = {**done.timings, "resample": seconds}
            heard = chosen_audio(info.audio, stream)
            codec = heard.codec if heard else ""
            result = AudioResult(
                waveform, stages, cached=False, lease=lease, codec=codec, source=ref.digest
            )
            if ref.storable:
                self.cache.put(key, result)
            return result

        return await self._audio_flights.run(key, decode, ref.claim)

    def decode_request(self, ref: MediaRef, plan: VideoPlan) -> DecodeRequest:
        """What a decode worker is asked for a video whose frames follow from the plan alone."""
        return DecodeRequest(
            sampling=plan.sampling,
            size=plan.size,
            audio="optional" if plan.audio else "none",
            decoder=self.config.decode.backend,
            gpu=self.gpu,
            threads=self.config.decode.threads,
            limits=self.limits,
            picture=self.picture,
            audio_stream=plan.audio_stream,
            content=ref.digest if plan.sampling.span and ref.storable else "",
        )

    async def _decode_video(self, ref: MediaRef, plan: VideoPlan, key: str) -> VideoResult:
        blob = await ref.open()
        request = self.decode_request(ref, plan)
        started = time.perf_counter()
        info = await self.probe(ref, plan.sampling.video_stream)
        stages = {"probe": time.perf_counter() - started}
        if info.video is None:
            raise NoSuchStreamError(
                "The media has no video stream that holds a frame.", parameter="video_url"
            )
        known = self._tables.get(_probe_key(ref, plan.sampling.video_stream))
        # With the packet table, the frames of a span are counted, and not estimated.
        info = info_of(known or info, plan.sampling)
        if plan.chooser is not None:
            indices = tuple(int(i) for i in plan.chooser(info))
            # The chooser limits the frames itself; the limits on a decode job hold as well.
            explicit = replace(
                plan.sampling,
                policy="explicit",
                indices=indices,
                max_frames=self.limits.max_frames,
            )
            request = replace(request, sampling=explicit)
        request = replace(request, info=known)
        lease, sized = await self._room(ref, blob, info, request)
        try:
            done = await self.pool.run(blob.fd, request, sized)
            for stage, seconds in done.timings.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
            assert done.frames is not None
            assert done.selection is not None
            waveform: Waveform | None = None
            if done.audio is not None:
                name = key_of("track", key) if plan.sampling.span is None else None
                resampled = await self._resample(done.audio, done.audio_rate, name)
                waveform, stages["resample"] = resampled
            sound = () if waveform is None else (memory_of(waveform),)
            lease.follow(done.frames, *sound)
        except BaseException:
            lease.release()
            raise
        frames = SampledFrames(
            done.frames,
            digest=key,
            # With stock vLLM's choice of frames the model is told about time what stock tells it:
            # nothing.
            times=None if plan.chooser else tuple(float(t) for t in done.selection.times),
            audio=waveform,
            step=done.selection.step,
            pinned=is_pinned(plan.size, done.info, done.frames.shape),
        )
        if ref.storable and plan.recordable:
            found = (done.info, done.selection, done.audio_note)
            frames.memo[DELIVERED] = Delivered(*found, limits_key(self.limits))
        if plan.sampling.span is not None:
            frames.digest = await asyncio.to_thread(
                window_digest, frames, done.info, done.selection
            )
        return VideoResult(
            frames, done.info, done.selection, stages, False, lease, done.audio_note, ref.digest
        )

    def _decoded_meanwhile(self, key: str) -> VideoResult | AudioResult | None:
        """What is in the cache by now; that it still is not there is no further miss."""
        return self.cache.get(key) if key in self.cache else None

    async def _room(
        self, ref: MediaRef, blob: Blob, info: MediaInfo, request: DecodeRequest
    ) -> tuple[Lease, Callable[[int], None]]:
        """Bytes of the media budget for what a job will make, and a call that corrects them.

        They are acquired before the job has a worker, so they are an upper estimate. Only what the
        headers claim makes a request too large.
        """
        most = sure = frame_bytes(info, request)
        resampled, rate = 0, self.traits.audio_rate
        wanted = info.audio if request.audio != "none" else ()
        stream = chosen_audio(wanted, request.audio_stream)
        if stream is not None:
            resampled = audio_bytes(info, stream, request, rate)
            most += audio_bytes(info, stream, request) + resampled
            sure += claimed_audio_bytes(info, stream, request)
            sure += claimed_audio_bytes(info, stream, request, rate)
        lease = await ref.claim.acquire(most, beside=blob.size, sure=min(sure, most))
        return lease, lambda num_bytes: lease.resize(num_bytes + resampled)

    async def _resample(
        self, samples: np.ndarray[Any, Any], rate: int, digest: str | None
    ) -> tuple[Waveform, float]:
        """A waveform at the model's rate, and the seconds this took."""
        started = time.perf_counter()
        target = self.traits.audio_rate or rate
        if target != rate:
            samples = await asyncio.to_thread(audio_ops.resample, samples, rate, target)
        own = digest or str(blake3(samples.view(np.uint8).data).hexdigest())
        return Waveform(samples, digest=own, rate=target), time.perf_counter() - started

    def stats(self) -> dict[str, Any]:
        """Counters of the decode pool and the decoded cache."""
        return {"decode": self.pool.stats(), "decoded_cache": asdict(self.cache.stats())}

    def forget(self, digests: Collection[str]) -> None:
        """Drop all that is known of files by digest, and the workers, which may hold them."""
        self.cache.discard_where(lambda _, value: value.source in digests)
        for probes in (self._probed, self._tables):
            probes.discard_where(lambda key, _: key.partition("|")[0] in digests)
        self._windows.clear()  # Keys do not tell of which file a window was.
        self.pool.renew()

    def close(self) -> None:
        """Stop the workers and forget everything."""
        self.pool.close()
        self.cache.clear()
        for known in (self._probed, self._tables, self._windows):
            known.clear()


def _probe_key(ref: MediaRef, stream: int | str | None) -> str:
    return ref.digest if stream is None else f"{ref.digest}|{stream}"
