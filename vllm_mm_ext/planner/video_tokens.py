"""Tokens and mm items of one video, from how its model lays it out."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.planner.request_tokens import ItemTokens, Stages
from vllm_mm_ext.video.segments import VideoLayout, cut_video


@dataclass(frozen=True)
class EncoderShape:
    """What of the encoders decides their inputs.

    Attributes:
        patch: Side of a patch of the vision encoder in pixels.
        audio_per_token: Positions of the audio encoder behind one audio token; 0 without one.
        joint: A segment and its sound are one mm item.
    """

    patch: int
    audio_per_token: int = 0
    joint: bool = False


def video_tokens(
    layout: VideoLayout,
    reduction: Reduction,
    segment_tokens: int,
    encoder: EncoderShape,
    *,
    frames: int,
    text: int,
) -> tuple[Stages, tuple[ItemTokens, ...]]:
    """Tokens after each stage, and the mm items that the engine gets.

    Args:
        layout: How the model lays the video out.
        reduction: The token reduction.
        segment_tokens: ``segments.tokens`` of the settings.
        encoder: What of the encoders decides their inputs.
        frames: Frames delivered.
        text: Tokens around and between the visual and the audio tokens.
    """
    per_grid = (layout.size[0] // encoder.patch) * (layout.size[1] // encoder.patch)
    pooling = Reduction(pool=reduction.pool)
    items: list[ItemTokens] = []
    pooled = visual = sound = 0
    cuts = cut_video(layout, reduction, segment_tokens)
    for number, cut in enumerate(cuts, 1):
        grids = cut.grids[1] - cut.grids[0]
        audio = cut.audio[1] - cut.audio[0]
        own = reduction.count(grids, layout.height, layout.width) if grids else 0
        own += layout.tail if number == len(cuts) else 0
        pooled += pooling.count(grids, layout.height, layout.width) if grids else 0
        visual, sound = visual + own, sound + audio
        encoded = grids * layout.tokens_per_grid
        heard = audio * encoder.audio_per_token
        if encoder.joint:
            items.append(
                ItemTokens(
                    "video", grids * per_grid + heard, encoded + audio, own + audio, heard, audio
                )
            )
            continue
        items.append(ItemTokens("video", grids * per_grid, encoded, own))
        if audio:
            items.append(ItemTokens("audio", heard, audio, audio))
    stages = Stages(
        sampled=frames,
        encoded=layout.grids * layout.tokens_per_grid,
        pooled=pooled,
        temporal=visual,
        sound=sound,
        text=text,
    )
    return stages, tuple(items)
