"""The projectors: from the encoders' outputs to embeddings of the text model. Plain PyTorch.

`reference.py` trains these modules and vLLM's model serves them, so the weights have the same names
in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from vllm_mm_ext.composer.configuration import STATES_PER_SECOND, ComposerConfig
from vllm_mm_ext.composer.pooling import (
    SpatialPooler,
    TemporalCompressor,
    TimestampEmbedding,
    average_groups,
    group_sizes,
)


class VideoProjector(nn.Module):  # type: ignore[misc]
    """Turns patch tokens into embeddings: pooling, time, temporal reduction, projection.

    Args:
        config: Configuration of the checkpoint. Each spatial pool that it declares, and each pair
            of pool and temporal reduction that is learned, has weights of its own.
    """

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__()
        hidden, heads = config.hidden, config.heads
        assert hidden is not None
        assert heads is not None
        vision = int(config.vision_config.hidden_size)
        text = text_width(config)
        self._config = config
        self.input = nn.Linear(vision, hidden)
        self.poolers = nn.ModuleDict(
            {
                str(pool): SpatialPooler(hidden, heads, config.frame_tokens(pool))
                for pool in sorted({one.pool for one in config.declared} - {1})
            }
        )
        self.time = TimestampEmbedding(hidden)
        self.compressors = nn.ModuleDict(
            {
                f"{one.pool}x{one.temporal}": TemporalCompressor(
                    hidden, heads, config.frame_tokens(one.pool), one.temporal
                )
                for one in config.declared
                if one.temporal > 1 and one.method == "learned"
            }
        )
        self.projection = projection(hidden, text)
        self.group_time = TimestampEmbedding(text)

    def forward(
        self,
        patches: torch.Tensor,
        seconds: torch.Tensor,
        frames_per_item: Sequence[int],
        pool: int = 1,
        temporal: int = 1,
    ) -> torch.Tensor:
        """Embeddings of all items, one item after the other, each in order of time.

        Args:
            patches: ``[frames, side * side, vision_hidden]`` patch tokens of the frames of all
                items.
            seconds: float32 ``[frames]`` time of each frame from the start of its video.
            frames_per_item: Number of frames of each item, in order.
            pool, temporal: The token reduction, one that the checkpoint declares (1 and 1: none).

        Returns:
            ``[sum(ceil(frames / temporal)) * ceil(side / pool) ** 2, text_hidden]``.

        Raises:
            ValueError: The checkpoint does not declare the reduction, or the frames do not add up.
        """
        method = self._config.method(pool, temporal)
        x = self.input(patches)
        if pool > 1:
            x = self.poolers[str(pool)](x)
        tokens = x.shape[1]
        x = x + self.time(seconds)[:, None]
        if temporal > 1 and method == "learned":
            x = self.compressors[f"{pool}x{temporal}"](x, frames_per_item)
        else:
            x = average_groups(x, frames_per_item, temporal)
        sizes = torch.tensor(group_sizes(frames_per_item, temporal))
        group = torch.repeat_interleave(sizes).to(seconds.device)
        middle = seconds.new_zeros(len(sizes), dtype=torch.float32)
        middle = middle.index_add(0, group, seconds.float()) / sizes.to(seconds.device)
        out: torch.Tensor = self.projection(x) + self.group_time(middle).repeat_interleave(
            tokens, dim=0
        )
        return out


class AudioProjector(nn.Module):  # type: ignore[misc]
    """Turns frames of the audio encoder into embeddings: stacking, projection, time.

    Args:
        config: Configuration of the checkpoint. ``audio_stack`` consecutive encoder frames, each of
            20 ms, become one token.
    """

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__()
        assert config.audio_config is not None
        states = int(config.audio_config.d_model)
        text = text_width(config)
        self.stack = config.audio_stack
        self.projection = projection(states * self.stack, text)
        self.time = TimestampEmbedding(text)

    def forward(
        self, states: Sequence[torch.Tensor], start_seconds: Sequence[float]
    ) -> list[torch.Tensor]:
        """Embeddings of each window.

        Args:
            states: Encoder frames ``[frames, d_model]`` of each window, without padding.
            start_seconds: Time in seconds at which each window begins.

        Returns:
            ``[ceil(frames / audio_stack), text_hidden]`` of each window. If the last token has
            fewer than ``audio_stack`` frames, zeros stand for the others. A token's time is that
            of its first frame.
        """
        counts = [math.ceil(len(window) / self.stack) for window in states]
        if not sum(counts):
            width = self.time.linear.out_features
            return [window.new_zeros(0, width) for window in states]
        stacked = torch.cat(
            [
                F.pad(window, (0, 0, 0, count * self.stack - len(window))).unflatten(
                    0, (count, self.stack)
                )
                for window, count in zip(states, counts, strict=True)
                if count
            ]
        ).flatten(1)
        step = self.stack / STATES_PER_SECOND
        seconds = torch.tensor(
            [
                start + step * index
                for start, count in zip(start_seconds, counts, strict=True)
                for index in range(count)
            ],
            dtype=torch.float32,
            device=stacked.device,
        )
        out = self.projection(stacked) + self.time(seconds)
        return list(out.split(counts))


def projection(channels: int, text: int) -> nn.Sequential:
    """LayerNorm and a two-layer MLP into the text model, as in LLaVA-1.5 (Liu et al. 2024).

    Args:
        channels: Input channels.
        text: Channels of the text model's embeddings.
    """
    return nn.Sequential(
        nn.LayerNorm(channels), nn.Linear(channels, text), nn.GELU(), nn.Linear(text, text)
    )


def text_width(config: ComposerConfig) -> int:
    """Channels of the text model's embeddings."""
    text = config.text_config
    return int(getattr(text, "get_text_config", lambda: text)().hidden_size)
