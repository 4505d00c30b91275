"""Qwen3-Omni's and Qwen2.5-VL's positions, and the order of encoder outputs in a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omni_reference import (
    even,
    make_processor,
    pixels,
    positions,
    render,
    rope_index,
    sound,
    video,
    without_video,
)
from transformers import Qwen3OmniMoeProcessor
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoePreTrainedModelForConditionalGeneration as HFModel,
)
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration as StockVL,
)
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerForConditionalGeneration as StockOmni,
)
from vllm.multimodal.media import MediaWithBytes

from vllm_mm_ext.adapters.models.omni import in_prompt_order
from vllm_mm_ext.adapters.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as VL
from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration as Omni
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.video.grid_times import GridTimes

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
AUDIO = "<|audio_start|><|audio_pad|><|audio_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module", params=[0, 24, 1024], ids=lambda tokens: f"segments={tokens}")
def omni(request: pytest.FixtureRequest) -> Any:
    processor = make_processor("qwen3_omni", Omni)
    processor.segment_tokens = request.param
    return processor


@pytest.fixture(scope="module")
def stock_omni() -> Any:
    return make_processor("qwen3_omni", StockOmni)


@pytest.fixture(scope="module", params=[0, 24, 1024], ids=lambda tokens: f"segments={tokens}")
def vl(request: pytest.FixtureRequest) -> Any:
    processor = make_processor("qwen2_5_vl", VL)
    processor.segment_tokens = request.param
    return processor


@pytest.fixture(scope="module")
def stock_vl() -> Any:
    return make_processor("qwen2_5_vl", StockVL)


@pytest.mark.parametrize(
    ("num_frames", "fps", "seconds"),
    [(8, 1.0, 8.0), (8, 2.0, 4.0), (2, 2.0, 0.9), (6, 1.0, 11.3), (12, 2.0, 2.0), (9, 3.0, 3.0)],
)
def test_qwen3_omni_equals_transformers(omni, num_frames, fps, seconds):
    hf = Qwen3OmniMoeProcessor.from_pretrained(checkpoint("qwen3_omni"))
    frames, track = pixels(num_frames), sound(seconds)
    prompt = f"before {VIDEO} after"
    result = render(omni, prompt, {"video": [video(frames, even(num_frames, fps), track)]})
    expected = hf(
        text=prompt,
        videos=[frames],
        audio=[np.pad(track, (0, -len(track) % 160))],  # vLLM pads to whole mel frames
        use_audio_in_video=True,
        fps=fps,
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()
    theirs, _ = rope_index(
        HFModel,
        omni.info.get_hf_config(),
        expected["input_ids"],
        video_grid_thw=expected["video_grid_thw"],
        use_audio_in_video=True,
        audio_seqlens=expected["feature_attention_mask"].sum(-1),
        second_per_grids=expected["video_second_per_grid"],
    )
    # transformers keeps fractions of a position, for which vLLM has no room.
    np.testing.assert_array_equal(positions(Omni, omni, result)[0], np.floor(theirs))


def test_qwen3_omni_without_sound_in_video_is_as_in_stock_vllm(omni, stock_omni):
    data = {
        "audio": [np.asarray(sound(1.0)), np.asarray(sound(2.5))],
        "video": [pixels(8), pixels(5)],
        "image": [pixels(1)[0]],
    }
    prompt = f"{AUDIO}{VIDEO} {IMAGE} b {VIDEO}{AUDIO}"
    mine, theirs = (render(p, prompt, data) for p in (omni, stock_omni))
    assert mine["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert without_video(mine["mm_hashes"]) == without_video(theirs["mm_hashes"])
    np.testing.assert_array_equal(
        positions(Omni, omni, mine)[0], positions(StockOmni, stock_omni, theirs)[0]
    )


def as_stock(clip: MediaWithBytes) -> MediaWithBytes:
    frames, metadata = clip.media
    return MediaWithBytes((np.asarray(frames), metadata), clip.original_bytes)


@pytest.mark.parametrize("fps", [0.4, 1.0, 2.0, 3.0])
def test_qwen2_5_vl_keeps_transformers_rate_for_even_frames(vl, stock_vl, fps):
    clips = [video(pixels(9), even(9, fps)), video(pixels(4, seed=1), even(4, fps))]
    prompt = f"{VIDEO} and {IMAGE}{VIDEO} then"
    image = [pixels(1)[0]]
    mine = render(vl, prompt, {"video": clips, "image": image})
    theirs = render(stock_vl, prompt, {"video": [as_stock(c) for c in clips], "image": image})
    assert without_video(mine["mm_hashes"]) == without_video(theirs["mm_hashes"])
    assert mine["prompt_token_ids"] == theirs["prompt_token_ids"]
    np.testing.assert_array_equal(
        positions(VL, vl, mine)[0], positions(StockVL, stock_vl, theirs)[0]
    )


def test_qwen2_5_vl_places_uneven_frames_at_their_times_beside_even_ones(vl, stock_vl):
    uneven = [0.0, 0.1, 0.2, 0.3, 0.4, 2.5, 5.0, 9.0]
    clips = [video(pixels(8), uneven), video(pixels(4, seed=1), even(4, 2.0))]
    prompt = f"{VIDEO}{VIDEO} then"
    result = render(vl, prompt, {"video": clips})
    stock = render(stock_vl, prompt, {"video": [as_stock(c) for c in clips]})
    found, theirs = positions(VL, vl, result)[0], positions(StockVL, stock_vl, stock)[0]
    places = result["mm_placeholders"]["video"]
    first = found[:, places[0].offset : places[0].offset + places[0].length]
    grids = GridTimes(tuple(uneven[::2]), None)
    expected = grids.temporal_positions(vl.info.get_hf_config().vision_config.tokens_per_second)
    assert first[0, :: places[0].length // 4].tolist() == (expected + first[0, 0]).tolist()
    second = slice(places[1].offset, places[1].offset + places[1].length)
    relative = found[:, second] - found[:, second].min()
    np.testing.assert_array_equal(relative, theirs[:, second] - theirs[:, second].min())
    assert (np.diff(found[0]) >= 0).all()


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4], [0, 30, 60, 600, 1799]])
def test_a_list_of_frames_has_the_positions_of_stock_vllm(vl, stock_vl, indices):
    """Frames that a client sends itself (a JPEG sequence): stock knows as much of their times."""
    metadata = {
        "total_num_frames": indices[-1] + 1,
        "fps": 30.0,
        "duration": (indices[-1] + 1) / 30.0,
        "video_backend": "jpeg_sequence",
        "frames_indices": indices,
        "do_sample_frames": False,
    }
    data = {"video": [(pixels(5), metadata)], "image": [pixels(1)[0]]}
    mine, theirs = (render(p, f"{IMAGE}{VIDEO} then", data) for p in (vl, stock_vl))
    assert mine["prompt_token_ids"] == theirs["prompt_token_ids"]
    np.testing.assert_array_equal(
        positions(VL, vl, mine)[0], positions(StockVL, stock_vl, theirs)[0]
    )


@given(st.lists(st.sampled_from(["video", "audio", "image"]), min_size=1, max_size=40), st.data())
def test_encoder_outputs_end_up_at_their_own_tokens(placed, data):
    """Rows of video and sound, whole or cut anywhere, come out in the order of the placeholders.

    So do those of images and of a client's own embeddings, which come in that order.
    """
    kinds = sorted(set(placed))
    parts: dict[str, list[tuple[str, list[int]]]] = {}
    for kind in kinds:
        rows = [i for i, k in enumerate(placed) if k == kind]
        if kind == "image":
            items = [rows[i : i + 1] for i in range(len(rows))]
            names = st.sampled_from(["image", "prompt_embeds"])
            parts[kind] = [(data.draw(names), item) for item in items]
        else:
            cut = data.draw(st.integers(0, len(rows)))
            parts[kind] = [(kind, rows[:cut]), (kind, rows[cut:])]
    given_parts = [part for kind in data.draw(st.permutations(kinds)) for part in parts[kind]]
    # Images have more columns: what the deeper layers get.
    embeddings = [
        torch.tensor(rows).reshape(-1, 1).expand(-1, 3 if name == "image" else 1)
        for name, rows in given_parts
    ]
    ordered = in_prompt_order(embeddings, [name for name, _ in given_parts], np.asarray(placed))
    assert torch.cat([e[:, 0] for e in ordered]).tolist() == list(range(len(placed)))
    assert [e.modality for e in ordered for _ in range(len(e))] == placed


def test_encoder_outputs_that_do_not_fit_their_tokens_are_an_error():
    with pytest.raises(ValueError, match="placeholder tokens"):
        in_prompt_order([torch.zeros(3, 1)], ["video"], np.asarray(["video"] * 2))
