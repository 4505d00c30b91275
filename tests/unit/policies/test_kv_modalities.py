"""The map of a prompt says of every position what stands there."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_mm_ext.policies.kv.modalities import ModalityMap

VIDEO, AUDIO, MARKER, WORD = 1, 2, 3, 4
NAMES = {VIDEO: "video", AUDIO: "audio", MARKER: "text", WORD: "text"}


def feature(modality: str, offset: int, tokens: list[int], embeds: tuple[int, ...]) -> Any:
    mask = torch.isin(torch.tensor(tokens), torch.tensor(embeds))
    place = PlaceholderRange(offset, len(tokens), mask)
    return MultiModalFeatureSpec(None, modality, f"{modality}-{offset}", place)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.sampled_from([1, 2, 3]), min_size=1))),
    st.integers(0, 30),
    st.integers(1, 30),
)
def test_sound_inside_a_video_is_audio_and_its_markers_are_text(
    items: list[tuple[int, list[int]]], start: int, length: int
) -> None:
    tokens: list[int] = []
    features = []
    for words, own in items:
        tokens += [WORD] * words
        features.append(feature("video", len(tokens), own, (VIDEO, AUDIO)))
        tokens += own
    positions = range(start, start + length)
    found = ModalityMap(features, tokens, AUDIO)
    names = [name for run, name in found.runs(positions) for _ in run]
    padded = tokens + [WORD] * (positions.stop - len(tokens))
    assert names == [NAMES[padded[position]] for position in positions]
    assert found.counts(positions) == {name: names.count(name) for name in set(names)}


def test_a_video_and_its_sound_that_share_a_range_are_told_apart_by_their_masks() -> None:
    tokens = [VIDEO, VIDEO, AUDIO, VIDEO, AUDIO]
    features = [feature("video", 2, tokens, (VIDEO,)), feature("audio", 2, tokens, (AUDIO,))]
    found = ModalityMap(features, None)
    assert list(found.runs(range(8))) == [
        (range(2), "text"),
        (range(2, 4), "video"),
        (range(4, 5), "audio"),
        (range(5, 6), "video"),
        (range(6, 7), "audio"),
        (range(7, 8), "text"),
    ]


def test_an_item_without_a_mask_is_its_modality_throughout() -> None:
    place = PlaceholderRange(1, 3)
    spec = MultiModalFeatureSpec(None, "image", "x", place)
    assert ModalityMap([spec], None).counts(range(6)) == {"image": 3, "text": 3}
