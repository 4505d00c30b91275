"""What a server makes of a record instead of decoding the video."""

from __future__ import annotations

from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.frontend import MediaFrontend
from vllm_mm_ext.media.payload import reduced_digest
from vllm_mm_ext.media.recorded import RecordedFrames, unpack
from vllm_mm_ext.media.results import VideoResult
from vllm_mm_ext.media.video_plan import VideoPlan


def name_for(frontend: MediaFrontend, ref: MediaRef, plan: VideoPlan) -> str:
    """Name of the record of a video that was not decoded here: the digest of its frames."""
    return reduced_digest(frontend.video_key(ref, plan), plan.reduction)


def holds_frames(frontend: MediaFrontend, ref: MediaRef, plan: VideoPlan) -> bool:
    """Whether a video's frames are here from an earlier request."""
    return frontend.video_key(ref, plan) in frontend.cache


def recorded_video(
    frontend: MediaFrontend, ref: MediaRef, plan: VideoPlan, data: bytes
) -> VideoResult:
    """A video by its record, without frames and sound.

    Args:
        frontend: Of this server.
        ref: The media.
        plan: The plan, for which the record was named.
        data: The record's bytes.

    Raises:
        RecordError: The bytes are no record of an answer to this plan.
    """
    record = unpack(data, frontend.decode_request(ref, plan))
    frames = RecordedFrames.of_record(record, frontend.video_key(ref, plan), plan.reduction)
    found = record.delivered
    return VideoResult(
        frames, found.info, found.selection, {}, True, None, found.audio_note, ref.digest
    )
