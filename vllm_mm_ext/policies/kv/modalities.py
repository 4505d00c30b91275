"""The modality of each position in a prompt: `video`, `audio`, `image`... or `text`.

Positions that get no embedding of an encoder are text, also inside an mm item (its markers and
times). An item may hold two modalities: the composer's videos come with their sound, for which a
token of its own stands.
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
    """Modalities in one prompt.

    Args:
        features: The prompt's mm items, in prompt order.
        tokens: The prompt's token ids; None for a prompt of embeddings.
        audio_token: The token that stands for sound inside a video item; None if there is none.
    """

    features: Sequence[Feature]
    tokens: Sequence[int] | None
    audio_token: int | None = None

    def runs(self, positions: range) -> Iterator[tuple[range, str]]:
        """Runs of neighbouring positions of one modality, in order; together they cover all.

        Args:
            positions: Positions in the prompt; those beyond the prompt are text.
        """
        codes, names = self._codes(positions)
        begin = positions.start
        for code, members in groupby(codes.tolist()):
            end = begin + sum(1 for _ in members)
            yield range(begin, end), names[code]
            begin = end

    def counts(self, positions: range) -> dict[str, int]:
        """Number of positions of each modality that occurs."""
        codes, names = self._codes(positions)
        counts = np.bincount(codes).tolist()
        return {name: count for name, count in zip(names, counts, strict=False) if count}

    def _codes(self, positions: range) -> tuple[npt.NDArray[np.uint8], list[str]]:
        """For each position an index into the names of modalities, and these names."""
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
