"""What the media of a request have the API server and its decode workers do."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_mm_ext.planner.rates import HostCosts
from vllm_mm_ext.planner.request_tokens import MediumTokens, RequestTokens
from vllm_mm_ext.planner.workload import Workload

# In `HostCosts.megapixel`: pictures that are no video.
PICTURE = "picture"


@dataclass(frozen=True)
class MediumWork:
    """The work for one medium.

    Attributes:
        codec: FFmpeg's name of a video's codec, `PICTURE`, or "" of sound by itself.
        megapixels: What is decoded.
        frame_megapixels: What of it is delivered, at the size that the model takes.
        sound_s: Seconds of sound that are decoded.
        inputs: Inputs of the vision encoder.
        sent: Inputs of all encoders.
    """

    codec: str
    megapixels: float
    frame_megapixels: float
    sound_s: float
    inputs: int
    sent: int

    @property
    def in_worker(self) -> bool:
        """Whether decode workers probe and decode it; vLLM reads pictures in the API server."""
        return self.codec != PICTURE

    def main_s(self, costs: HostCosts) -> float:
        """Seconds of the API server's main thread."""
        return costs.medium + costs.sent_input * self.sent

    def cached_s(self, costs: HostCosts) -> float:
        """Seconds of the API server when its caches hold the medium."""
        if not self.in_worker:
            # vLLM reads pictures again for each request.
            return self.main_s(costs) + self.preprocess_s(costs)
        if costs.cached_medium is None:
            return costs.medium
        return costs.cached_medium + costs.cached_input * self.sent

    def probe_s(self, costs: HostCosts) -> float:
        """Seconds of a probe worker."""
        return costs.probe if self.in_worker else 0.0

    def decode_s(self, costs: HostCosts) -> float:
        """Seconds of a decode worker."""
        if not self.in_worker:
            return 0.0
        delivered = costs.frame_megapixel * self.frame_megapixels
        return costs.decode + self._decoded_s(costs) + delivered + costs.sound_second * self.sound_s

    def preprocess_s(self, costs: HostCosts) -> float:
        """Seconds of the preprocessing thread."""
        sound = costs.preprocess_sound_second * self.sound_s
        picture = 0.0 if self.in_worker else self._decoded_s(costs)
        return costs.preprocess + costs.preprocess_input * self.inputs + sound + picture

    def _decoded_s(self, costs: HostCosts) -> float:
        # Of a codec that was not measured, as much as of the dearest one that was.
        known = costs.megapixel
        price = known.get(self.codec, max(known.values(), default=0.0))
        return price * self.megapixels if self.codec else 0.0


def host_work(workload: Workload, request: RequestTokens) -> tuple[MediumWork, ...]:
    """The work for each medium of a request.

    All frames of a video's span are decoded: keyframes are further apart than the frames chosen.

    Args:
        workload: What clients send.
        request: What becomes of it; its media are those of the workload, of each kind in order.
    """
    videos, pictures = iter(workload.videos), iter(workload.images)
    found = []
    for medium in request.media:
        if medium.kind == "video":
            video = next(videos)
            pixels = video.width * video.height * video.source_fps * video.seconds
            found.append(_work(medium, video.codec, pixels))
        elif medium.kind == "image":
            picture = next(pictures)
            found.append(_work(medium, PICTURE, picture.width * picture.height))
        else:
            found.append(_work(medium, "", 0.0))
    return tuple(found)


def _work(medium: MediumTokens, codec: str, pixels: float) -> MediumWork:
    width, height = medium.size
    sent = sum(item.encoder_inputs for item in medium.items)
    heard = sum(
        item.encoder_inputs if item.modality == "audio" else item.audio_inputs
        for item in medium.items
    )
    delivered = medium.stages.sampled * width * height / 1e6
    return MediumWork(codec, pixels / 1e6, delivered, medium.audio_seconds, sent - heard, sent)
