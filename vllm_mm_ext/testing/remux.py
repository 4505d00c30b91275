"""Shorter versions of a clip that share its packets: what a recording was before it went on."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import av
from av.stream import Stream


def keep_first(
    source: str | PathLike[str], target: str | PathLike[str], *, seconds: float
) -> float:
    """Copy the first part of a clip, packet by packet, with its sound.

    Nothing is encoded again, so every frame and sample of the copy is one of the source. The cut
    lies where no kept frame refers to one that is left out (pictures are not stored in the order
    in which they are shown), at ``seconds`` or the nearest such place before.

    Args:
        source: Video file; its container must be known from the suffix of ``target`` too.
        target: File to write.
        seconds: Length to keep, from the first frame.

    Returns:
        Seconds of video kept.

    Raises:
        ValueError: No frame can be kept, or the source has no video.
    """
    with av.open(str(source)) as container:
        if not container.streams.video:
            raise ValueError(f"{source} has no video")
        video = container.streams.video[0]
        packets = [p for p in container.demux() if p.pts is not None]
        shown = sorted(_seconds(p) for p in packets if p.stream is video)
        begin = shown[0]
        number = _closed_prefix([_seconds(p) for p in packets if p.stream is video], begin, seconds)
        if not number:
            raise ValueError(f"no frame of {source} can be kept in {seconds} s")
        end = shown[number] if number < len(shown) else float("inf")
        left = {video.index: number}
        kept = []
        for packet in packets:
            if packet.stream is video:
                left[video.index] -= 1
                if left[video.index] >= 0:
                    kept.append(packet)
            elif packet.stream.type == "audio" and _seconds(packet) < end:
                kept.append(packet)
        _write(Path(target), kept)
        if number < len(shown):
            return shown[number] - begin
        # The last frame lasts as long as the one before it.
        return 2 * shown[-1] - shown[-2] - begin if len(shown) > 1 else 0.0


def _closed_prefix(times: Sequence[float], begin: float, seconds: float) -> int:
    """Most leading packets, in storage order, all shown before ``seconds`` and before the rest."""
    best = 0
    earliest_after = [float("inf")] * (len(times) + 1)
    for index in range(len(times) - 1, -1, -1):
        earliest_after[index] = min(times[index], earliest_after[index + 1])
    latest = -float("inf")
    for count, time in enumerate(times, 1):
        latest = max(latest, time)
        # Half a millisecond: container time bases round.
        if latest - begin >= seconds - 5e-4:
            break
        if latest < earliest_after[count]:
            best = count
    return best


def _seconds(packet: Any) -> float:
    return float(packet.pts * packet.time_base)


def _write(target: Path, packets: Sequence[Any]) -> None:
    with av.open(str(target), "w") as output:
        streams: dict[int, Stream] = {}
        for packet in packets:
            source = packet.stream
            if source.index not in streams:
                streams[source.index] = output.add_stream_from_template(source)
        for packet in packets:
            packet.stream = streams[packet.stream.index]
            output.mux(packet)
