"""Learned token reduction: queries cross-attend to a frame or a group of frames. Plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from vllm_mm_ext.composer.attention import varlen_cross_attention

# Periods of the timestamp features, in seconds. The shortest distinguishes frames within a second,
# the longest is longer than any video that is served.
SHORTEST_PERIOD_S = 0.5
LONGEST_PERIOD_S = 4 * 3600.0
PERIODS = 32


class CrossAttention(nn.Module):  # type: ignore[misc]
    """The queries of an item attend to the item's tokens; then an MLP. Both have residuals.

    Args:
        hidden: Channels of queries and tokens.
        heads: Attention heads; ``hidden`` must be a multiple of this.

    Raises:
        ValueError: ``hidden`` is not a multiple of ``heads``.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"{hidden} channels cannot be split into {heads} heads")
        self.heads = heads
        self.query_norm = nn.LayerNorm(hidden)
        self.token_norm = nn.LayerNorm(hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(
        self,
        queries: torch.Tensor,
        tokens: torch.Tensor,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
    ) -> torch.Tensor:
        """Attend within each item.

        Args:
            queries: ``[sum(q_lens), hidden]`` queries of all items.
            tokens: ``[sum(kv_lens), hidden]`` tokens of all items.
            q_lens, kv_lens: Number of queries and of tokens of each item, in order.

        Returns:
            ``[sum(q_lens), hidden]``.
        """
        seen = self.token_norm(tokens)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1))
            for x in (
                self.q_proj(self.query_norm(queries)),
                self.k_proj(seen),
                self.v_proj(seen),
            )
        )
        read = varlen_cross_attention(q, k, v, q_lens, kv_lens).flatten(-2)
        out = queries + self.out_proj(read)
        out = out + self.mlp(self.mlp_norm(out))
        normed: torch.Tensor = self.norm(out)
        return normed


class SpatialPooler(nn.Module):  # type: ignore[misc]
    """Fewer tokens per frame: learned queries cross-attend to the frame's patch tokens.

    Args:
        hidden: Channels.
        heads: Attention heads.
        tokens: Number of queries, which is the number of tokens left of each frame.
    """

    def __init__(self, hidden: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, hidden) / math.sqrt(hidden))
        self.attention = CrossAttention(hidden, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[frames, patches, hidden]`` to ``[frames, tokens, hidden]``."""
        frames, patches, hidden = x.shape
        tokens = len(self.queries)
        queries = self.queries.to(x.dtype).expand(frames, -1, -1).reshape(-1, hidden)
        out: torch.Tensor = self.attention(
            queries, x.reshape(-1, hidden), [tokens] * frames, [patches] * frames
        )
        return out.unflatten(0, (frames, tokens))


class TimestampEmbedding(nn.Module):  # type: ignore[misc]
    """Embeds absolute times in seconds, so that frames may be spaced unevenly.

    Sines and cosines of 32 periods from 0.5 s to 4 h in geometric steps, computed in float32, go
    through an MLP and a linear map, whose outputs are added.

    Args:
        hidden: Channels of the embedding.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * PERIODS, hidden)
        self.mlp = nn.Sequential(
            nn.Linear(2 * PERIODS, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def forward(self, seconds: torch.Tensor) -> torch.Tensor:
        """float32 ``[n]`` seconds to ``[n, hidden]`` in the dtype of the weights."""
        steps = torch.arange(PERIODS, device=seconds.device, dtype=torch.float32) / (PERIODS - 1)
        periods = SHORTEST_PERIOD_S * (LONGEST_PERIOD_S / SHORTEST_PERIOD_S) ** steps
        phase = (seconds.float()[:, None] / periods).frac() * (2 * math.pi)
        waves = torch.cat((phase.sin(), phase.cos()), dim=-1).to(self.linear.weight.dtype)
        out: torch.Tensor = self.linear(waves) + self.mlp(waves)
        return out


class TemporalCompressor(nn.Module):  # type: ignore[misc]
    """Reduces a group of frames to as many tokens as one frame has.

    The queries of a group are learned vectors added to the mean of the group's frames. They
    cross-attend to all tokens of the group, so an event of a single frame is not averaged away. The
    last group of an item may have fewer frames; it is not padded.

    Args:
        hidden: Channels.
        heads: Attention heads.
        tokens: Tokens of a frame, and tokens left of a group.
        stride: Frames per group.
    """

    def __init__(self, hidden: int, heads: int, tokens: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.queries = nn.Parameter(torch.randn(tokens, hidden) / math.sqrt(hidden))
        self.attention = CrossAttention(hidden, heads)

    def forward(self, x: torch.Tensor, frames_per_item: Sequence[int]) -> torch.Tensor:
        """``[frames, tokens, hidden]`` to ``[sum(ceil(frames / stride)) * tokens, hidden]``.

        Args:
            x: Tokens of the frames of all items.
            frames_per_item: Frames of each item, in order; groups never cross items.

        Raises:
            ValueError: The frames do not add up.
        """
        tokens = len(self.queries)
        sizes = group_sizes(frames_per_item, self.stride)
        mean = average_groups(x, frames_per_item, self.stride).unflatten(0, (-1, tokens))
        queries = (mean + self.queries.to(x.dtype)).flatten(0, 1)
        out: torch.Tensor = self.attention(
            queries, x.flatten(0, 1), [tokens] * len(sizes), [tokens * size for size in sizes]
        )
        return out


def group_sizes(frames_per_item: Sequence[int], stride: int) -> list[int]:
    """Number of frames of every group of every item, in order."""
    return [
        min(stride, frames - start)
        for frames in frames_per_item
        for start in range(0, frames, stride)
    ]


def average_groups(x: torch.Tensor, frames_per_item: Sequence[int], stride: int) -> torch.Tensor:
    """Mean of each group of up to ``stride`` frames.

    Args:
        x: ``[frames, tokens, hidden]`` of all items.
        frames_per_item: Frames of each item, in order.
        stride: Frames per group; the last group of an item may have fewer.

    Returns:
        ``[groups * tokens, hidden]``.

    Raises:
        ValueError: The frames do not add up.
    """
    if len(x) != sum(frames_per_item):
        raise ValueError(f"{len(x)} frames, but the items have {sum(frames_per_item)}")
    sizes = group_sizes(frames_per_item, stride)
    group = torch.repeat_interleave(torch.tensor(sizes)).to(x.device)
    sums = x.new_zeros(len(sizes), *x.shape[1:], dtype=torch.float32)
    sums = sums.index_add(0, group, x.float())
    counts = torch.tensor(sizes, dtype=torch.float32, device=x.device)[:, None, None]
    return (sums / counts).to(x.dtype).flatten(0, 1)
