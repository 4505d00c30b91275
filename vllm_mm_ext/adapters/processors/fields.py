"""The fields of an mm item that tell the model about its segment of a video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalFlatField

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.video.segments import Segment

POSITIONS = "video_grid_positions"
"""int64 ``[grids]`` per item: temporal position of each grid; empty for vLLM's own positions."""
CONTINUES = "video_continues"
"""bool per item: whether the segment goes on where the video item before it ended."""
REDUCTION = "video_reduction"
"""float64 ``[4]`` per item: pool, temporal, static (0 none, 1 merge, 2 prune), share kept."""
KEPT = "video_kept"
"""int64 ``[tokens]`` per item: cells that a static reduction keeps; empty without one."""
KINDS = "video_token_kinds"
"""uint8 ``[tokens]`` per item with embeddings of several modalities: the kind of each token of the
placeholder, `TEXT`, `VIDEO` or `AUDIO`."""
TEXT, VIDEO, AUDIO = range(3)

_STATIC: tuple[Literal["none", "merge", "prune"], ...] = ("none", "merge", "prune")


def configuration() -> dict[str, MultiModalFieldConfig]:
    """vLLM's configuration of the fields: one value per item, never on the device."""
    return {
        name: MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        for name in (POSITIONS, CONTINUES, REDUCTION, KEPT)
    }


@dataclass(frozen=True, kw_only=True)
class _FlatField(MultiModalFlatField):  # type: ignore[misc]
    """A flat field whose elements do not carry the slices of all items of the request.

    vLLM sends each element with its field between processes, so the bytes would grow with the
    square of the number of items.
    """

    def build_elems(self, modality: str, key: str, data: Any) -> Sequence[Any]:
        found = super().build_elems(modality, key, data)
        # vLLM only needs ``dim`` to batch elements again.
        field = MultiModalFlatField(slices=[], dim=self.dim, keep_on_cpu=self.keep_on_cpu)
        return [replace(elem, field=field) for elem in found]


def without_slices(
    config: Mapping[str, MultiModalFieldConfig],
) -> dict[str, MultiModalFieldConfig]:
    """The same fields, with flat fields replaced by `_FlatField`."""

    def of(field: Any) -> Any:
        if type(field) is not MultiModalFlatField:
            return field
        return _FlatField(slices=field.slices, dim=field.dim, keep_on_cpu=field.keep_on_cpu)

    return {name: replace(one, field=of(one.field)) for name, one in config.items()}


def segment_fields(parts: Sequence[Segment]) -> dict[str, Any]:
    """The values of the fields for some segments."""
    empty = torch.empty(0, dtype=torch.int64)
    return {
        POSITIONS: [_tensor(part.positions, empty) for part in parts],
        CONTINUES: torch.tensor([part.continues for part in parts]),
        REDUCTION: torch.tensor(
            [
                [r.pool, r.temporal, _STATIC.index(r.static), r.keep]
                for r in (part.reduction for part in parts)
            ],
            dtype=torch.float64,
        ),
        KEPT: [_tensor(part.kept, empty) for part in parts],
    }


def reduction_of(values: torch.Tensor | None) -> Reduction:
    """Read the field ``REDUCTION`` back."""
    if values is None:
        return NO_REDUCTION
    return _reduction(*values.tolist())


# A prompt may have hundreds of segments, each with the same reduction.
@lru_cache(maxsize=64)
def _reduction(pool: float, temporal: float, static: float, keep: float) -> Reduction:
    # ``segment_fields`` made the values from a valid Reduction, so they need no check.
    return Reduction.model_construct(
        pool=int(pool), temporal=int(temporal), static=_STATIC[int(static)], keep=keep
    )


def token_kinds(tokens: Sequence[int], video: int, audio: int) -> torch.Tensor:
    """The field ``KINDS`` of an item.

    Args:
        tokens: Token ids of the item's placeholder.
        video, audio: Ids of the tokens that stand for picture and for sound.
    """
    ids = torch.tensor(tokens)
    return ((ids == video) * VIDEO + (ids == audio) * AUDIO).to(torch.uint8)


def _tensor(values: npt.NDArray[np.int64] | None, empty: torch.Tensor) -> torch.Tensor:
    return empty if values is None else torch.from_numpy(np.ascontiguousarray(values))
