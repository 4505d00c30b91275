"""From what the encoders see to embeddings of the text model. Plain PyTorch.

The same modules train in `reference.py` and serve in vLLM, so their weights have the same names.
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
    """Patch tokens to embeddings: pooling, time, temporal reduction, projection.

    Args:
        config: Declares the reductions; each pool, and each pair with a learned method, has
            weights of its own.
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
        """Embeddings of all items, one after the other, each in order of time.

        Args:
            patches: ``[frames, side * side, vision_hidden]`` of the frames of all items.
            seconds: float32 ``[frames]``, time of each in its video.
            frames_per_item: Frames of each item, in order.
            pool, temporal: The reduction, one that the checkpoint declares (1 and 1: none).

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
    """Encoder frames to embeddings: stacking, projection, time.

    Args:
        config: ``audio_stack`` neighbouring encoder frames of 20 ms become one token.
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
            states: ``[frames, d_model]`` of each window, without padding.
            start_seconds: Time at which each window begins.

        Returns:
            ``[ceil(frames / audio_stack), text_hidden]`` of each window. What the last token lacks
            is filled with zeros; its time is that of its first frame.
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
    """Two-layer MLP into the text model, as in LLaVA-1.5 (Liu et al. 2024), after a LayerNorm."""
    return nn.Sequential(
        nn.LayerNorm(channels), nn.Linear(channels, text), nn.GELU(), nn.Linear(text, text)
    )


def text_width(config: ComposerConfig) -> int:
    """Channels of the text model's embeddings."""
    text = config.text_config
    return int(getattr(text, "get_text_config", lambda: text)().hidden_size)
