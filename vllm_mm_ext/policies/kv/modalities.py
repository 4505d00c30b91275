"""Which modality each position of a prompt is of: a map of `video`, `audio`, `image`... and `text`.

Positions without an embedding are text, those inside an item too (its markers and times). An item
may hold two modalities: the composer's videos come with their sound, which has a token of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.policies.kv.placement import Feature, end_of

TEXT = "text"
AUDIO = "audio"


@dataclass(frozen=True, slots=True)
class ModalityMap:
    """The map of one prompt.

    Args:
        features: Its mm items, in prompt order.
        tokens: Its token ids; None where it has none (embeddings).
        audio_token: What stands for sound inside a video item; None where that does not happen.
    """

    features: Sequence[Feature]
    tokens: Sequence[int] | None
    audio_token: int | None = None

    def runs(self, positions: range) -> Iterator[tuple[range, str]]:
        """Neighbouring positions of one modality each, in order; together they are all.

        Args:
            positions: In the prompt; those beyond it are text.
        """
        codes, names = self._codes(positions)
        begin = positions.start
        for code, members in groupby(codes.tolist()):
            end = begin + sum(1 for _ in members)
            yield range(begin, end), names[code]
            begin = end

    def counts(self, positions: range) -> dict[str, int]:
        """Positions of each modality that there is."""
        codes, names = self._codes(positions)
        counts = np.bincount(codes).tolist()
        return {name: count for name, count in zip(names, counts, strict=False) if count}

    def _codes(self, positions: range) -> tuple[npt.NDArray[np.uint8], list[str]]:
        """Which of the names each position has."""
        names = [TEXT, AUDIO]
        codes = np.zeros(len(positions), np.uint8)
        first = bisect_right(self.features, positions.start, key=end_of)
        for feature in self.features[first:]:
            start = feature.mm_position.offset
            if start >= positions.stop:
                break
            if feature.modality not in names:
                names.append(feature.modality)
            own = range(max(start, positions.start), min(end_of(feature), positions.stop))
            at = slice(own.start - positions.start, own.stop - positions.start)
            embedded = _embedded(feature, own)
            codes[at][embedded] = names.index(feature.modality)
            if self.audio_token is not None and self.tokens is not None:
                heard = np.asarray(self.tokens[own.start : own.stop]) == self.audio_token
                codes[at][embedded & heard] = names.index(AUDIO)
        return codes, names


def _embedded(feature: Feature, positions: range) -> npt.NDArray[np.bool_]:
    mask = getattr(feature.mm_position, "is_embed", None)
    if mask is None:
        return np.ones(len(positions), np.bool_)
    start = feature.mm_position.offset
    return np.asarray(mask[positions.start - start : positions.stop - start], np.bool_)
