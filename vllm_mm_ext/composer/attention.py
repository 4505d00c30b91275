"""Attention of many small sets of queries, each to its own tokens, in one batch without padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F  # noqa: N812


def varlen_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
) -> torch.Tensor:
    """Block-diagonal softmax attention, scaled by ``1 / sqrt(dim)``.

    The queries of item ``i`` attend to the keys of item ``i`` and to no others. On CUDA with
    xformers, one call of xformers' memory-efficient kernel does this for all items. Elsewhere
    PyTorch's scaled dot-product attention runs once per distinct pair of lengths.

    Args:
        q: ``[sum(q_lens), heads, dim]`` queries of all items.
        k, v: ``[sum(kv_lens), heads, dim]`` keys and values of all items.
        q_lens, kv_lens: Number of queries and of keys of each item, in order, each at least 1.

    Returns:
        ``[sum(q_lens), heads, dim]``.

    Raises:
        ValueError: The lengths do not sum to the tensors' sizes, ``q_lens`` and ``kv_lens`` differ
            in length, or a length is below 1.
    """
    if len(q_lens) != len(kv_lens) or min((*q_lens, *kv_lens), default=1) < 1:
        raise ValueError("every item needs at least one query and one key")
    if len(q) != sum(q_lens) or len(k) != sum(kv_lens) or len(v) != len(k):
        raise ValueError(
            f"{len(q)} queries, {len(k)} keys, {len(v)} values do not fit lengths adding up to "
            f"{sum(q_lens)} and {sum(kv_lens)}"
        )
    if not q_lens:
        return q
    if q.is_cuda and _has_xformers():
        return _xformers_attention(q, k, v, q_lens, kv_lens)
    if len(set(q_lens)) == 1 and len(set(kv_lens)) == 1:
        return _dense(q, k, v, len(q_lens))
    return _by_lengths(q, k, v, q_lens, kv_lens)


@cache
def _has_xformers() -> bool:
    return find_spec("xformers") is not None


def _xformers_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
    from xformers.ops.fmha.attn_bias import (  # type: ignore[import-not-found]
        BlockDiagonalMask,
    )

    mask = BlockDiagonalMask.from_seqlens(list(q_lens), list(kv_lens), device=q.device)
    out: torch.Tensor = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
    return out[0]


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, items: int) -> torch.Tensor:
    heads = [x.unflatten(0, (items, -1)).transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1)


def _by_lengths(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
) -> torch.Tensor:
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for item, lengths in enumerate(zip(q_lens, kv_lens, strict=True)):
        members[lengths].append(item)
    queries, keys, values = (
        x.split(list(lengths)) for x, lengths in ((q, q_lens), (k, kv_lens), (v, kv_lens))
    )
    parts: list[torch.Tensor] = [q] * len(q_lens)
    for (q_len, _), items in members.items():
        out = _dense(
            torch.cat([queries[i] for i in items]),
            torch.cat([keys[i] for i in items]),
            torch.cat([values[i] for i in items]),
            len(items),
        )
        for item, part in zip(items, out.split(q_len), strict=True):
            parts[item] = part
    return torch.cat(parts)
