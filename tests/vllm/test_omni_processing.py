"""Sound in video: tokens and positions of omni models, and what the caches see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from omni_reference import (
    even,
    features,
    make_processor,
    new_cache,
    pixels,
    positions,
    render,
    rope_index,
    sound,
    video,
    without_video,
)
from transformers import Qwen2_5OmniProcessor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniPreTrainedModelForConditionalGeneration as HFModel,
)
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerForConditionalGeneration as StockModel,
)

from vllm_mm_ext.adapters.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration as Model
from vllm_mm_ext.testing.checkpoints import checkpoint

FAMILY = "qwen2_5_omni"
VIDEO = "<|vision_bos|><|VIDEO|><|vision_eos|>"
AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"
IMAGE = "<|vision_bos|><|IMAGE|><|vision_eos|>"


@pytest.fixture(scope="module", params=[0, 24, 1024], ids=lambda tokens: f"segments={tokens}")
def ours(request: pytest.FixtureRequest) -> Any:
    processor = make_processor(FAMILY, Model)
    processor.segment_tokens = request.param
    return processor


@pytest.fixture(scope="module")
def whole() -> Any:
    """Videos of one segment each."""
    processor = make_processor(FAMILY, Model)
    processor.segment_tokens = 0
    return processor


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_processor(FAMILY, StockModel)


@pytest.fixture(scope="module")
def hf() -> Any:
    return Qwen2_5OmniProcessor.from_pretrained(checkpoint(FAMILY))


@pytest.mark.parametrize(
    ("num_frames", "fps", "seconds"),
    [
        (8, 2.0, 4.0),
        (2, 2.0, 0.5),
        (20, 2.0, 9.87),
        (20, 2.0, 3.0),
        (6, 2.0, 11.3),
        (30, 3.0, 10.0),
        (14, 1.4, 10.0),
        (7, 1.0, 7.2),
        (1, 2.0, 1.0),
    ],
)
def test_tokens_and_positions_equal_transformers(ours, hf, num_frames, fps, seconds):
    frames, track = pixels(num_frames), sound(seconds)
    prompt = f"before {VIDEO} after"
    data = {"video": [video(frames, even(num_frames, fps), track)]}
    result = render(ours, prompt, data)

    expected = hf(
        text=prompt,
        videos=[frames],
        audio=[np.asarray(track)],
        use_audio_in_video=True,
        fps=fps,
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()

    own, delta = positions(Model, ours, result)
    theirs, their_delta = rope_index(
        HFModel,
        ours.info.get_hf_config(),
        expected["input_ids"],
        video_grid_thw=expected["video_grid_thw"],
        use_audio_in_video=True,
        audio_seqlens=expected["feature_attention_mask"].sum(-1),
        second_per_grids=expected["video_second_per_grid"],
    )
    np.testing.assert_array_equal(own, theirs)
    assert delta == their_delta
    # The features of the sound are those of a clip padded to five minutes.
    pieces = [item["input_audio_features"].data for item in result["mm_kwargs"]["audio"]]
    mel = torch.cat(pieces, dim=1).float()
    frames_kept = expected["feature_attention_mask"][0].bool()
    padded = expected["input_features"][0][:, frames_kept]
    torch.testing.assert_close(mel, padded, atol=8e-3, rtol=8e-3)  # bfloat16


def test_transformers_order_of_audio_and_videos_with_sound(ours, hf):
    clips = [(pixels(8), sound(4.3, 1)), (pixels(6, seed=1), sound(2.0, 2))]
    loose = sound(1.5, 3)
    prompt = f"{VIDEO}{AUDIO} and {VIDEO} end"
    data = {
        "video": [video(f, even(len(f), 2.0), t) for f, t in clips],
        "audio": [np.asarray(loose)],
    }
    result = render(ours, prompt, data)
    expected = hf(
        text=prompt,
        videos=[f for f, _ in clips],
        audio=[np.asarray(a) for a in (clips[0][1], loose, clips[1][1])],
        use_audio_in_video=True,
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()
    own, _ = positions(Model, ours, result)
    theirs, _ = rope_index(
        HFModel,
        ours.info.get_hf_config(),
        expected["input_ids"],
        video_grid_thw=expected["video_grid_thw"],
        use_audio_in_video=True,
        audio_seqlens=expected["feature_attention_mask"].sum(-1),
        second_per_grids=expected["video_second_per_grid"],
    )
    np.testing.assert_array_equal(own, theirs)


PLAIN = {
    "text": ("only words", {}),
    "audio": (f"a {AUDIO} b", {"audio": [np.asarray(sound(1.0))]}),
    "image": (f"{IMAGE} b", {"image": [pixels(1)[0]]}),
    "video": (f"a {VIDEO}", {"video": [pixels(8)]}),
    "all": (
        f"{AUDIO}{VIDEO} {IMAGE} b {VIDEO}{AUDIO}",
        {
            "audio": [np.asarray(sound(1.0)), np.asarray(sound(2.5))],
            "video": [pixels(8), pixels(5)],
            "image": [pixels(1)[0]],
        },
    ),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("cached", [False, True])
def test_requests_without_sound_in_video_are_as_in_stock_vllm(whole, stock, name, cached):
    prompt, data = PLAIN[name]
    mine, theirs = (
        render(p, prompt, data, cache=new_cache(FAMILY) if cached else None) for p in (whole, stock)
    )
    assert mine["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert mine["mm_placeholders"].keys() == theirs["mm_placeholders"].keys()
    for modality, places in theirs["mm_placeholders"].items():
        assert [(p.offset, p.length) for p in mine["mm_placeholders"][modality]] == [
            (p.offset, p.length) for p in places
        ]
    assert without_video(mine["mm_hashes"]) == without_video(theirs["mm_hashes"])
    for modality, items in theirs["mm_kwargs"].items():
        for mine_item, item in zip(mine["mm_kwargs"][modality], items, strict=True):
            # Stock's mask is padded to five minutes as its features were; nothing reads it.
            for key in item.keys() - {"feature_attention_mask"}:
                one, other = mine_item[key].data.float(), item[key].data.float()
                torch.testing.assert_close(one, other, msg=key)
    if name != "text":
        np.testing.assert_array_equal(
            positions(Model, whole, mine)[0], positions(StockModel, stock, theirs)[0]
        )


def test_a_silent_video_at_the_assumed_rate_is_as_in_stock_vllm(ours, stock):
    prompt = f"{VIDEO} what"
    mine = render(ours, prompt, {"video": [video(pixels(8), even(8, 2.0))]})
    theirs = render(stock, prompt, {"video": [pixels(8)]})
    assert mine["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert "audio" not in mine["mm_placeholders"]
    np.testing.assert_array_equal(
        positions(Model, ours, mine)[0], positions(StockModel, stock, theirs)[0]
    )


def test_a_silent_video_has_the_positions_of_its_own_rate(ours, hf):
    prompt = f"{VIDEO} what"
    result = render(ours, prompt, {"video": [video(pixels(12), even(12, 0.3))]})
    expected = hf(
        text=prompt,
        videos=[pixels(12)],
        fps=0.3,
        do_sample_frames=False,
        return_tensors="pt",
    )
    theirs, _ = rope_index(
        HFModel,
        ours.info.get_hf_config(),
        expected["input_ids"],
        video_grid_thw=expected["video_grid_thw"],
        second_per_grids=expected["video_second_per_grid"],
    )
    np.testing.assert_array_equal(positions(Model, ours, result)[0], theirs)
    item = result["mm_kwargs"]["video"][0]
    assert float(item["second_per_grid_ts"].data) == pytest.approx(2 / 0.3)
    assert not item["use_audio_in_video"].data


@pytest.mark.parametrize("apart", [2.0, 5.0, 20.0])
def test_grids_further_apart_than_chunks_stand_beside_the_sound_of_their_times(ours, apart):
    """transformers would cut such grids into pieces, so that each chunk has visual tokens."""
    times = [i * apart / 2 for i in range(8)]
    result = render(ours, VIDEO, {"video": [video(pixels(8), times, sound(4 * apart))]})
    ids = np.asarray(result["prompt_token_ids"])
    config = ours.info.get_hf_config()
    per_grid = int((ids == config.video_token_id).sum()) // 4
    heard = np.cumsum(ids == config.audio_token_id)[ids == config.video_token_id]
    assert heard.tolist() == [
        50 * int(time // 2) for time in times[::2] for _ in range(per_grid)
    ]  # 50 audio tokens in a chunk of two seconds


UNEVEN = [0.0, 0.1, 0.2, 0.3, 0.4, 2.5, 5.0, 9.0]


@pytest.mark.parametrize("track", [None, sound(10.0)])
def test_unevenly_sampled_frames_sit_at_their_own_times(ours, track):
    result = render(ours, VIDEO, {"video": [video(pixels(8), UNEVEN, track)]})
    ids = np.asarray(result["prompt_token_ids"])
    config = ours.info.get_hf_config()
    found, _ = positions(Model, ours, result)
    visual = found[0][ids == config.video_token_id]
    start = visual[0]
    assert sorted(set(visual - start)) == [round(25 * t) for t in UNEVEN[::2]]
    if track is not None:
        heard = found[0][ids == config.audio_token_id]
        assert heard[0] == start
        # Grids at 0.0, 0.2, 0.4 | - | 5.0 | - ; two seconds of sound after each chunk.
        kinds = "".join(
            {config.video_token_id: "v", config.audio_token_id: "a"}.get(i, "|") for i in ids
        )
        per_grid = (kinds.count("v")) // 4
        chunks = ["v" * (3 * per_grid), "a" * 50, "", "a" * 50, "v" * per_grid, "a" * 150]
        assert kinds == "||" + "".join(chunks) + "||"


def test_a_video_with_sound_beside_a_silent_one_and_a_loose_waveform(whole):
    loud, silent = video(pixels(8), even(8, 2.0), sound(4.0)), video(pixels(6), even(6, 2.0))
    loose = sound(1.0, seed=5)
    for prompt, videos in (
        (f"{VIDEO}{VIDEO}{AUDIO}", [loud, silent]),
        (f"{AUDIO}{VIDEO}{VIDEO}", [silent, loud]),
        (f"{VIDEO}{AUDIO}{VIDEO}", [silent, loud]),
    ):
        result = render(whole, prompt, {"video": videos, "audio": [loose]})
        flags = [bool(i["use_audio_in_video"].data) for i in result["mm_kwargs"]["video"]]
        assert flags == [v is loud for v in videos]
        shared = {
            (f.mm_position.offset, f.mm_position.length)
            for f in features(result)
            if f.modality == "video" and f.data["use_audio_in_video"].data
        }
        audios = result["mm_placeholders"]["audio"]
        # The waveform a client sent keeps its place; the track follows.
        assert (audios[1].offset, audios[1].length) in shared
        assert audios[0].get_num_embeds() == 25
        assert audios[1].get_num_embeds() == 100
        picture, track = [
            f.mm_position.is_embed
            for f in features(result)
            if f.mm_position.offset == audios[1].offset
        ]
        assert not (picture & track).any()
        positions(Model, whole, result)


@pytest.mark.parametrize("evicted", ["audio", "video", None])
def test_video_and_its_sound_are_cached_apart(whole, evicted):
    """Whichever of the two is in the cache, the prompt and placeholders are the same."""
    clip = video(pixels(8), even(8, 2.0), sound(4.0))
    prompt = f"see {VIDEO}"
    fresh = render(whole, prompt, {"video": [clip]})
    cache = new_cache(FAMILY)
    render(whole, prompt, {"video": [clip]}, cache=cache)
    if evicted:
        cache._cache.pop(fresh["mm_hashes"][evicted][0])
    again = render(whole, prompt, {"video": [clip]}, cache=cache)
    assert again["prompt_token_ids"] == fresh["prompt_token_ids"]
    assert again["mm_hashes"] == fresh["mm_hashes"]
    for modality in ("audio", "video"):
        (one,), (other,) = again["mm_placeholders"][modality], fresh["mm_placeholders"][modality]
        assert (one.offset, one.length) == (other.offset, other.length)
        assert torch.equal(one.is_embed, other.is_embed)


def test_sound_is_known_with_the_segment_that_it_is_in(ours):
    """A connector may know KV by one item of a placeholder: equal sound does not make it equal."""
    track = sound(4.0)
    one, other, again = (
        render(ours, VIDEO, {"video": [video(pixels(8, seed=seed), even(8, 2.0), track)]})
        for seed in (1, 2, 1)
    )
    assert not set(one["mm_hashes"]["audio"]) & set(other["mm_hashes"]["audio"])
    assert one["mm_hashes"] == again["mm_hashes"]
    # By itself it has no segment.
    loose = [render(ours, AUDIO, {"audio": [track]})["mm_hashes"]["audio"] for _ in range(2)]
    assert loose[0] == loose[1]


def test_a_video_named_by_uuid_keeps_its_sound_when_sent_by_name_alone(ours):
    clip = video(pixels(8), even(8, 2.0), sound(4.0))
    cache = new_cache(FAMILY)
    first = render(ours, VIDEO, {"video": [clip]}, {"video": ["clip-1"]}, cache)
    again = render(ours, VIDEO, {"video": [None]}, {"video": ["clip-1"]}, cache)
    assert again["prompt_token_ids"] == first["prompt_token_ids"]
    assert again["mm_hashes"] == first["mm_hashes"]
    cache.clear_cache()
    with pytest.raises(ValueError, match="by uuid alone"):
        render(ours, VIDEO, {"video": [None]}, {"video": ["clip-1"]}, cache)


def test_sound_tracks_do_not_count_against_the_audio_limit():
    processor = make_processor(FAMILY, Model, audio_limit=1)
    clips = [video(pixels(4, seed=i), even(4, 2.0), sound(2.0, i)) for i in range(3)]
    data = {"video": clips, "audio": [sound(1.0)]}
    result = render(processor, VIDEO * 3 + AUDIO, data)
    assert len(result["mm_placeholders"]["audio"]) == 4
    with pytest.raises(VLLMValidationError, match="At most 1 audio"):
        render(processor, AUDIO * 2, {"audio": [sound(1.0), sound(2.0)]})


def test_videos_are_silent_where_the_server_takes_no_audio():
    processor = make_processor(FAMILY, Model, audio_limit=0)
    assert not processor.hears_video
    result = render(processor, VIDEO, {"video": [video(pixels(4), even(4, 2.0), sound(2.0))]})
    assert "audio" not in result["mm_placeholders"]


def test_a_track_too_short_for_a_token_is_silence(ours):
    result = render(ours, VIDEO, {"video": [video(pixels(4), even(4, 2.0), sound(0.015))]})
    assert "audio" not in result["mm_placeholders"]


def test_a_waveform_too_short_for_a_token_is_refused(ours):
    with pytest.raises(ValueError, match="too few for the model to hear"):
        render(ours, AUDIO, {"audio": [sound(0.015)]})


def test_waveforms_are_hashed_by_digest(ours):
    samples = np.asarray(sound(1.0))
    relabelled = [sound(1.0).__class__(samples, digest=d, rate=16000) for d in ("x", "x", "y")]
    hashes = [render(ours, AUDIO, {"audio": [w]})["mm_hashes"]["audio"][0] for w in relabelled]
    assert hashes[0] == hashes[1] != hashes[2]


def test_profiling_inputs_can_be_built(ours):
    made = ours.get_dummy_mm_inputs({"audio": 1, "image": 1, "video": 1})
    assert {m: len(p) for m, p in made["mm_placeholders"].items()} == {
        "audio": 1,
        "image": 1,
        "video": 1,
    }


@pytest.mark.parametrize("cached", [False, True])
def test_stocks_own_flag_for_sound_in_video_still_works(ours, stock, cached):
    data = {"video": [pixels(8)], "audio": [np.asarray(sound(4.3))]}
    mine, theirs = (
        render(
            p,
            VIDEO,
            data,
            cache=new_cache(FAMILY) if cached else None,
            use_audio_in_video=True,
        )
        for p in (ours, stock)
    )
    assert mine["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert without_video(mine["mm_hashes"]) == without_video(theirs["mm_hashes"])
    for modality in ("audio", "video"):
        (one,), (other,) = mine["mm_placeholders"][modality], theirs["mm_placeholders"][modality]
        assert (one.offset, one.get_num_embeds()) == (other.offset, other.get_num_embeds())
    positions(Model, ours, mine)
