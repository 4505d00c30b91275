"""The composer's layout and processors, without an engine."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omni_reference import RATE, make_processor, new_cache, pixels, render, sound, video
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.models.composer import MMExtComposerForConditionalGeneration
from vllm_mm_ext.adapters.processors.fields import AUDIO, VIDEO
from vllm_mm_ext.adapters.processors.model_traits import read_traits
from vllm_mm_ext.composer.hf_processor import ComposerProcessor
from vllm_mm_ext.composer.layout import video_layout
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.errors import MediaError, UnheldMediaError
from vllm_mm_ext.testing.checkpoints import checkpoint

SIDE = 56
DEFAULT = Reduction(pool=2, temporal=4)
PAIRS = ((1, 1), (2, 1), (1, 3), (1, 4), (2, 4))
PROMPT = "see <|video_pad|> what"


@cache
def ours() -> Any:
    return make_processor("composer", MMExtComposerForConditionalGeneration)


@cache
def plain() -> ComposerProcessor:
    return ComposerProcessor.from_pretrained(checkpoint("composer"))


def variant(path: Path, changes: dict[str, Any], **limits: int) -> Any:
    """The processor of the tiny checkpoint with another configuration."""
    plugin.register()
    source = checkpoint("composer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes((source / name).read_bytes())
    (path / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | changes)
    )
    config = ModelConfig(
        model=str(path), max_model_len=16_384, limit_mm_per_prompt={"audio": 8, "video": 8} | limits
    )
    context = MULTIMODAL_REGISTRY._create_processing_ctx(config, None)
    return MMExtComposerForConditionalGeneration._processor_factory.build_processor(context)


# --- token counts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference design: 224 pixels in patches of 14, pooled to 64 tokens, groups of four."""
    vision = plain().config.vision_config.to_dict() | {"image_size": 224, "patch_size": 14}
    return variant(
        tmp_path_factory.mktemp("design"), {"vision_config": vision, "audio_config": None}
    )


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(10, 320), (60, 1920), (300, 9600), (1800, 57600), (7200, 230400)]
)
def test_the_design_has_exactly_these_counts(design: Any, seconds: int, tokens: int) -> None:
    frames = int(seconds * design.config.fps)
    times = [k / design.config.fps for k in range(frames)]
    count = design.video_tokens(
        frames, 224, 224, times=times, audio_samples=0, reduction=design.default_reduction
    )
    assert count.visual == tokens
    assert count.audio == 0
    if seconds > 60:  # Gigabytes of frames.
        return
    made = render(design, PROMPT, {"video": [pixels(frames, 224, 224)]})
    assert sum(place.get_num_embeds() for place in made["mm_placeholders"]["video"]) == tokens
    assert made["prompt_token_ids"].count(design.video_token_id) == tokens


ascending = st.lists(st.floats(0, 40), min_size=1, max_size=14, unique=True).map(sorted)


@settings(max_examples=60)
@given(
    ascending,
    st.sampled_from(PAIRS),
    st.integers(0, 9 * RATE),
    st.sampled_from([0, 7, 16, 40, 200]),
)
def test_segments_are_the_prompt_of_the_whole_video(
    times: list[float], pair: tuple[int, int], samples: int, segment_tokens: int
) -> None:
    processor, config = ours(), ours().config
    processor.segment_tokens = segment_tokens
    reduction = Reduction(pool=pair[0], temporal=pair[1])
    track = sound(samples / RATE) if samples else None
    clip = video(pixels(len(times), SIDE, SIDE), times, track, reduction=reduction)
    made = render(processor, PROMPT, {"video": [clip]})
    seconds = [round(time * 1e6) / 1e6 for time in times]
    heard = 0 if track is None else len(track)
    whole = video_layout(config, seconds, pool=pair[0], temporal=pair[1], audio_samples=heard)
    text = processor.info.get_tokenizer().encode(PROMPT)
    at = text.index(processor.video_token_id)
    assert made["prompt_token_ids"] == text[:at] + whole + text[at + 1 :]
    count = processor.video_tokens(
        len(times), SIDE, SIDE, times=times, audio_samples=heard, reduction=reduction
    )
    assert count.total == len(whole)
    assert count.visual == whole.count(config.video_pad_token_id)
    assert count.audio == whole.count(config.audio_pad_token_id)
    kinds = torch.cat([item["video_token_kinds"].data for item in made["mm_kwargs"]["video"]])
    assert int((kinds == VIDEO).sum()) == count.visual
    assert int((kinds == AUDIO).sum()) == count.audio
    largest = processor.info.get_mm_max_tokens_per_item(16_384, {})["video"]
    if 0 < segment_tokens <= largest:
        places = made["mm_placeholders"]["video"]
        assert max(place.get_num_embeds() for place in places) <= max(
            segment_tokens, config.side**2, config.audio_tokens(config.window_samples)[0]
        )


# --- inputs ---------------------------------------------------------------------------------------


def fields(made: dict[str, Any], key: str) -> torch.Tensor:
    return torch.cat([item[key].data for item in made["mm_kwargs"]["video"]], dim=-1)


@pytest.mark.parametrize("segment_tokens", [0, 16])
def test_vllm_and_transformers_processors_agree(segment_tokens: int) -> None:
    ours().segment_tokens = segment_tokens
    times, track = (0.0, 0.4, 1.9, 2.0, 2.6, 6.5, 9.0), sound(5.2)
    clip, alone = pixels(7, SIDE, SIDE), sound(3.1, 1)
    prompt = PROMPT + " <|audio_pad|>"
    made = render(
        ours(), prompt, {"video": [video(clip, times, track, reduction=DEFAULT)], "audio": [alone]}
    )
    expected = plain()(prompt, [clip], [alone], seconds=[times], sounds=[track])
    assert made["prompt_token_ids"] == expected["input_ids"][0].tolist()
    items = made["mm_kwargs"]["video"]
    dtype = items[0]["pixel_values_videos"].data.dtype
    seen = torch.cat([item["pixel_values_videos"].data for item in items])
    assert torch.equal(seen, expected["pixel_values"].to(dtype))
    assert fields(made, "video_grid_positions").tolist() == [round(t * 1e6) for t in times]
    own = made["mm_kwargs"]["audio"]
    heard = torch.cat([fields(made, "video_mel"), *(item["audio_mel"].data for item in own)], 1)
    assert torch.equal(heard, torch.cat(expected["features"], dim=1).to(dtype))
    states = [*fields(made, "video_states").tolist(), *(int(i["audio_states"].data) for i in own)]
    assert states == expected["lengths"]
    first = [int(item["audio_first_window"].data) for item in own]
    assert [2.0 * number for number in first] == expected["start_seconds"][-len(own) :]


def test_frames_of_another_size_are_resized_as_in_transformers() -> None:
    ours().segment_tokens = 0
    clip = pixels(3, 40, 90)
    made = render(ours(), PROMPT, {"video": [clip]})
    got = made["mm_kwargs"]["video"][0]["pixel_values_videos"].data
    expected = plain()(PROMPT, [clip])["pixel_values"]
    assert torch.equal(got, expected.to(got.dtype))
    by_hf = plain().video_processor(videos=[torch.from_numpy(clip).permute(0, 3, 1, 2)])
    assert torch.allclose(by_hf["pixel_values_videos"][0], expected, atol=1e-6)


def test_a_segment_of_sound_alone_joins_those_with_frames_of_another_size() -> None:
    ours().segment_tokens = 16
    clip = video(pixels(2, 40, 90), [0.0, 0.5], sound(9.0))
    items = render(ours(), PROMPT, {"video": [clip]})["mm_kwargs"]["video"]
    made = [item["pixel_values_videos"].data for item in items]
    assert {len(frames) > 0 for frames in made} == {True, False}
    assert {tuple(frames.shape[1:]) for frames in made} == {(3, SIDE, SIDE)}


def test_windows_of_sound_do_not_depend_on_what_follows() -> None:
    """A longer version of a clip keeps the segments and the windows that it shares."""
    ours().segment_tokens = 60
    track, longer = sound(12.0), sound(12.0)[: 8 * RATE]
    times = [k / 2 for k in range(24)]
    clip = pixels(24, SIDE, SIDE)

    def hashes(frames: int, samples: Any, alone: Any) -> tuple[list[str], list[str]]:
        heard = type(track)(np.asarray(samples), digest=f"{len(samples)}", rate=RATE)
        data = {
            "video": [video(clip[:frames], times[:frames], heard, reduction=DEFAULT)],
            "audio": [np.asarray(alone)],
        }
        made = render(ours(), PROMPT + " <|audio_pad|>", data)["mm_hashes"]
        return made["video"], made["audio"]

    short, whole = hashes(16, longer, track[: 4 * RATE]), hashes(24, track, track)
    assert 1 < len(short[0]) < len(whole[0])
    assert whole[0][: len(short[0]) - 1] == short[0][:-1]
    assert whole[1][:2] == short[1]
    assert len({*whole[0], *whole[1]}) == len(whole[0]) + len(whole[1])


def test_the_same_frames_at_another_time_are_another_item() -> None:
    ours().segment_tokens = 0
    clip = pixels(4, SIDE, SIDE)
    made = [
        render(ours(), PROMPT, {"video": [video(clip, [start + k for k in range(4)])]})
        for start in (0, 10)
    ]
    first, second = (one["mm_hashes"]["video"] for one in made)
    assert first != second


def test_the_processor_cache_changes_nothing() -> None:
    ours().segment_tokens = 16
    store = new_cache("composer")
    clip = video(pixels(9, SIDE, SIDE), [k / 2 for k in range(9)], sound(4.5))
    data = {"video": [clip], "audio": [np.asarray(sound(4.1, 2))]}
    prompt = PROMPT + " <|audio_pad|>"
    plainly = render(ours(), prompt, data)
    for _ in range(2):
        made = render(ours(), prompt, data, cache=store)
        assert made["prompt_token_ids"] == plainly["prompt_token_ids"]
        assert made["mm_hashes"] == plainly["mm_hashes"]


def test_media_known_by_name_are_found_again() -> None:
    ours().segment_tokens = 16
    store = new_cache("composer")
    data = {
        "video": [video(pixels(9, SIDE, SIDE), [k / 2 for k in range(9)], sound(4.5))],
        "audio": [np.asarray(sound(4.1, 3))],
    }
    prompt, names = PROMPT + " <|audio_pad|>", {"video": ["clip"], "audio": ["song"]}
    first = render(ours(), prompt, data, names, cache=store)
    again = render(ours(), prompt, {"video": [None], "audio": [None]}, names, cache=store)
    assert again["prompt_token_ids"] == first["prompt_token_ids"]
    assert again["mm_hashes"] == first["mm_hashes"]


@pytest.mark.parametrize(("modality", "prompt"), [("video", PROMPT), ("audio", "<|audio_pad|>")])
def test_a_name_that_is_not_known_is_answered_as_for_other_models(
    modality: str, prompt: str
) -> None:
    with pytest.raises(UnheldMediaError, match=f"does not hold that {modality}"):
        render(ours(), prompt, {modality: [None]}, {modality: ["other"]})


def test_times_of_frames_come_from_the_loader_where_frames_have_none() -> None:
    ours().segment_tokens = 0
    clip = pixels(3, SIDE, SIDE)
    told = {"fps": 25.0, "frames_indices": [0, 5, 50], "do_sample_frames": False}
    # vLLM's loaders say that of all frames of a clip; a composer chooses none of them.
    all_frames = told | {"do_sample_frames": True}
    items = [((clip, one), [0.0, 0.2, 2.0]) for one in (told, all_frames)]
    for item, seconds in (*items, (clip, [0.0, 0.5, 1.0])):
        made = render(ours(), PROMPT, {"video": [item]})
        assert fields(made, "video_grid_positions").tolist() == [s * 1e6 for s in seconds]


def test_times_stand_in_the_prompt_where_the_checkpoint_wants_them(tmp_path: Path) -> None:
    processor = variant(tmp_path, {"timestamps": True})
    processor.segment_tokens = 8
    times = [0.0, 0.26, 3.0, 4.5, 11.04, 12.5]
    clip = video(pixels(6, SIDE, SIDE), times, reduction=DEFAULT)
    made = render(processor, PROMPT, {"video": [clip]})
    text = processor.info.get_tokenizer().decode(made["prompt_token_ids"])
    assert text.replace("<|video_pad|>", "") == "see <video>0.0s<frame>11.0s<frame></video> what"
    count = processor.video_tokens(6, SIDE, SIDE, times=times, audio_samples=0, reduction=DEFAULT)
    words = len(processor.info.get_tokenizer().encode(PROMPT)) - 1
    assert count.total == len(made["prompt_token_ids"]) - words


# --- what can be asked ----------------------------------------------------------------------------


def test_only_declared_reductions_are_taken_and_the_error_names_them() -> None:
    clip = pixels(4, SIDE, SIDE)
    for reduction in (Reduction(pool=4), Reduction(pool=2, static="prune", keep=0.5)):
        with pytest.raises(MediaError, match="pool 1, temporal 1; pool 2, temporal 1") as caught:
            render(ours(), PROMPT, {"video": [video(clip, reduction=reduction)]})
        assert caught.value.parameter == "mm_ext.reduction"
    kept = Reduction(static="prune", keep=0.5)
    made = render(ours(), PROMPT, {"video": [video(clip, reduction=kept)]})
    embeds = [place.get_num_embeds() for place in made["mm_placeholders"]["video"]]
    assert sum(embeds) == kept.count(4, 4, 4)


def test_a_video_without_a_plan_gets_the_default_of_the_checkpoint() -> None:
    ours().segment_tokens = 0
    made = render(ours(), PROMPT, {"video": [pixels(8, SIDE, SIDE)]})
    assert made["mm_placeholders"]["video"][0].get_num_embeds() == DEFAULT.count(8, 4, 4)


def test_the_front_end_is_told_what_the_model_takes() -> None:
    traits = read_traits(ours())
    assert (traits.size_rule.kind, traits.size_rule.height) == ("fixed", SIDE)
    assert (traits.frame_multiple, traits.audio_rate, traits.hears_video) == (1, RATE, True)
    assert traits.default_reduction == DEFAULT
    assert traits.trained is not None
    assert traits.trained.pairs == PAIRS
    assert traits.sound_token == ours().config.audio_pad_token_id


@pytest.mark.parametrize("how", ["no audio tower", "no audio allowed"])
def test_a_model_that_does_not_hear_takes_videos_silent(tmp_path: Path, how: str) -> None:
    deaf = how == "no audio tower"
    processor = variant(
        tmp_path, {"audio_config": None} if deaf else {}, **({} if deaf else {"audio": 0})
    )
    assert not read_traits(processor).hears_video
    clip = video(pixels(4, SIDE, SIDE), [0, 1, 2, 3], sound(4.0))
    ids = render(processor, PROMPT, {"video": [clip]})["prompt_token_ids"]
    assert processor.config.audio_pad_token_id not in ids
    with pytest.raises(VLLMValidationError, match="At most 0 audio"):
        render(processor, "<|audio_pad|>", {"audio": [np.asarray(sound(1.0))]})


def test_what_is_no_video_or_sound_of_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8 frames"):
        render(ours(), PROMPT, {"video": [pixels(2, SIDE, SIDE).astype(np.float32)]})
    with pytest.raises(ValueError, match="one placeholder"):
        render(ours(), "no placeholder", {"video": [pixels(2, SIDE, SIDE)]})
    with pytest.raises(ValueError, match="fewer placeholders"):
        render(ours(), "no placeholder", {"audio": [np.asarray(sound(1.0))]})
    with pytest.raises(MediaError, match="empty"):
        render(ours(), "<|audio_pad|>", {"audio": [np.zeros(0, np.float32)]})


def test_dummy_media_are_the_largest_segment() -> None:
    processor = ours()
    processor.segment_tokens = 1024
    data = processor.dummy_inputs.get_dummy_mm_data(4096, {"video": 1, "audio": 1}, {})
    text = processor.dummy_inputs.get_dummy_text({"video": 1, "audio": 1})
    made = render(processor, text, data)
    most = processor.info.get_mm_max_tokens_per_item(4096, {})
    (seen,), (heard,) = (made["mm_placeholders"][kind] for kind in ("video", "audio"))
    assert (seen.get_num_embeds(), heard.get_num_embeds()) == (most["video"], most["audio"])


# --- the model ------------------------------------------------------------------------------------


def test_embeddings_stand_in_the_order_of_the_prompt() -> None:
    from vllm_mm_ext.adapters.models.composer import _interleaved

    kinds = torch.tensor([0, 2, 2, 0, 0, 1, 0, 1, 1, 0, 2, 0], dtype=torch.uint8)
    seen, heard = torch.tensor([[10], [11], [12]]), torch.tensor([[20], [21], [22]])
    joined = _interleaved(kinds, seen, heard)
    assert joined.flatten().tolist() == [20, 21, 10, 11, 12, 22]
    assert _interleaved(kinds, seen, None) is seen


def test_segments_with_different_reductions_are_encoded_together() -> None:
    """One call has what each would have by itself, whatever is beside it."""
    from vllm_mm_ext.composer.projector import VideoProjector

    config = plain().config
    torch.manual_seed(0)
    fake: Any = SimpleNamespace(
        config=config,
        encoder_max_patches=32,
        vision_tower=lambda frames: frames,
        video_projector=VideoProjector(config),
    )
    fake._no_tokens = lambda: torch.empty(0, config.text_config.hidden_size)
    width = config.vision_config.hidden_size
    counts = (5, 0, 2, 9, 4)
    frames = [torch.randn(count, 16, width) for count in counts]
    seconds = [torch.arange(count) / 2.0 for count in counts]
    reductions = [DEFAULT, DEFAULT, Reduction(pool=2), NO_REDUCTION, DEFAULT]
    kept = [torch.empty(0, dtype=torch.int64)] * 5
    encode = MMExtComposerForConditionalGeneration._encode_frames
    with torch.inference_mode():
        together = encode(fake, frames, seconds, reductions, kept)
        for index, tokens in enumerate(together):
            one = slice(index, index + 1)
            (alone,) = encode(fake, frames[one], seconds[one], reductions[one], kept[one])
            assert len(tokens) == reductions[index].count(counts[index], 4, 4)
            assert torch.allclose(tokens, alone, atol=1e-5)
    assert all(len(a) or len(b) for a, b in itertools.pairwise(together))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_towers_run_side_by_side_only_where_no_other_rank_shares_their_sums(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_mm_ext.adapters.models import composer

    stream, given = object(), []

    def in_parallel(see: Any, hear: Any, *events_and_stream: Any) -> tuple[Any, Any]:
        given.append(events_and_stream[-1])
        return see(), hear()

    monkeypatch.setattr(composer, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(composer, "aux_stream", lambda: stream)
    monkeypatch.setattr(composer, "maybe_execute_in_parallel", in_parallel)
    fake: Any = SimpleNamespace(
        _events=(None, None),
        _encode_frames=lambda *_: ["seen"],
        _encode_windows=lambda _: ["heard"],
    )
    frames: Any = [SimpleNamespace(is_cuda=True)]
    inputs: Any = {"video_reduction": [], "video_kept": []}
    windows = [(torch.empty(1, 1), 1, 0.0)]
    made = MMExtComposerForConditionalGeneration._side_by_side(fake, frames, [], inputs, windows)
    assert made == (["seen"], ["heard"])
    assert given == [stream if ranks == 1 else None]
