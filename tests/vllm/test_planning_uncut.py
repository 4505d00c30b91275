"""Planning where the server's set-up or a request leaves videos to stock vLLM: none is reduced."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import front as front_module
import pytest
from front import CONTEXT, Front, Rendered, opened
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from vllm_mm_ext.adapters.processors.segment_info import largest_item
from vllm_mm_ext.adapters.serving import planning
from vllm_mm_ext.request.context import RequestContext
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_clip

CONFIG: dict[str, Any] = {
    "media": {"sampling": {"fps": 2.0, "max_frames": 64, "min_frames": 2}},
    "compression": {"reduction": {"pool": 2}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    make_clip(folder / "short.mp4", duration=4, seed=1)
    make_clip(folder / "long.mp4", duration=20, seed=2)
    make_clip(folder / "heard.mp4", duration=4, seed=3, audio=[Tone(440, 0, 4)])
    make_clip(folder / "heard_long.mp4", duration=30, seed=4, audio=[Tone(440, 0, 30)])
    return folder


@pytest.fixture(scope="module")
def front(files: Path) -> Iterator[Front]:
    with opened(files, video_pruning_rate=0.5, additional_config={"mm_ext": CONFIG}) as made:
        yield made


def test_the_server_s_reduction_is_not_applied(front: Front) -> None:
    (video,) = front.render("short.mp4").videos
    assert (video["frames"], video["lowered"], video["reduction"]["pool"]) == (8, [], 1)


def test_the_server_s_reduction_is_not_applied_to_stock_s_frames(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG | {"media": {"sampling": {"policy": "stock"}}}
    with opened(files, video_pruning_rate=0.5, additional_config={"mm_ext": config}) as made:
        (video,) = made.render("long.mp4").videos
    assert (video["policy"], video["reduction"]["pool"]) == ("stock", 1)
    assert "compression.reduction has no effect" in caplog.text


def test_nothing_is_reduced_where_the_request_s_options_leave_a_video_whole(files: Path) -> None:
    model = str(checkpoint("qwen2_5_omni"))
    whole = {"mm_processor_kwargs": {"use_audio_in_video": True}}
    with opened(files, model=model, additional_config={"mm_ext": CONFIG}) as made:
        assert made.render("heard.mp4").videos[0]["reduction"]["pool"] == 2
        messages = made.messages("heard.mp4")
        url = (files / "heard.mp4").as_uri()
        messages[0]["content"].append({"type": "audio_url", "audio_url": {"url": url}})
        (video,) = made.render_messages(messages, **whole).videos
        assert video["reduction"]["pool"] == 1
        with pytest.raises(VLLMValidationError, match="mm_processor_kwargs, allows no token red"):
            made.render("heard.mp4", options={"reduction": {"pool": 2}}, **whole)


def heard_whole(front: Front, name: str, options: dict[str, Any] | None = None) -> Rendered:
    """A request whose options leave the named clip whole, with the clip's sound beside it."""
    messages = front.messages(name)
    url = (front.files / name).as_uri()
    messages[0]["content"].append({"type": "audio_url", "audio_url": {"url": url}})
    return front.render_messages(
        messages, options, mm_processor_kwargs={"use_audio_in_video": True}
    )


def test_a_video_that_the_request_s_options_leave_whole_fits_the_context(files: Path) -> None:
    arguments: dict[str, Any] = {
        "model": str(checkpoint("qwen2_5_omni")),
        "additional_config": {"mm_ext": CONFIG},
        # With its cache, vLLM refuses a second request with the same sound and other frames.
        "mm_processor_cache_gb": 0,
    }
    with opened(files, **arguments) as made:
        whole = heard_whole(made, "heard_long.mp4")
        assert whole.prompt_tokens < CONTEXT
        assert "context" in {entry["why"] for entry in whole.videos[0]["lowered"]}
        fewer = heard_whole(made, "heard_long.mp4", {"total_tokens": 1400})
        assert fewer.trace.tokens["video"] + fewer.trace.tokens["audio"] <= 1400


def test_a_video_that_the_request_s_options_leave_whole_fits_the_encoder_cache(
    files: Path,
) -> None:
    arguments: dict[str, Any] = {
        "model": str(checkpoint("qwen2_5_omni")),
        "additional_config": {"mm_ext": CONFIG | {"segments": {"tokens": 64}}},
        "max_model_len": 2 * CONTEXT,
        "max_num_batched_tokens": 512,
    }
    with opened(files, **arguments) as made:
        whole = heard_whole(made, "heard_long.mp4")
        most = MultiModalBudget(made.renderer.config, MULTIMODAL_REGISTRY).encoder_cache_size
        assert whole.video_tokens <= most
        assert "limit" in {entry["why"] for entry in whole.videos[0]["lowered"]}


@pytest.mark.parametrize(
    ("family", "limits"),
    [
        ("qwen2_5_omni", {}),
        ("qwen3_vl", {}),
        ("qwen2_5_vl", {}),
        ("qwen3_vl", {"image": 0}),
        ("qwen2_5_vl", {"image": 0}),
    ],
)
def test_a_whole_video_may_have_as_much_as_the_encoder_cache_of_vllm_holds(
    files: Path, monkeypatch: pytest.MonkeyPatch, family: str, limits: dict[str, int]
) -> None:
    arguments: dict[str, Any] = {
        "max_num_batched_tokens": 512,
        "limit_mm_per_prompt": {"video": 3} | limits,
    }
    with opened(files, model=str(checkpoint(family)), **arguments) as made:
        config, info = made.renderer.config, made.renderer.mm_processor.info
        # Pictures of real checkpoints may have more tokens than segments.
        monkeypatch.setattr(type(info), "get_max_image_tokens", lambda _: 4096)
        holds = MultiModalBudget(config, MULTIMODAL_REGISTRY).encoder_cache_size
        assert largest_item(config, info, cut=False) == holds


class Asked:
    """What an encoder was asked."""

    name: str | None = None
    takes_records = False
    used_records = 0
    whole: Any = None
    is_open = False
    item_tokens = 0

    def begin(self, _: Any, item_tokens: int) -> None:
        self.item_tokens = item_tokens

    def end(self) -> None: ...


def test_an_encoder_makes_items_no_larger_than_the_server_that_asks_takes_them(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Unreduced, the clip has more tokens than either server takes as one item.
    config = {"media": CONFIG["media"], "segments": {"tokens": 0}}

    def planned(most: int, **known: Any) -> Any:
        monkeypatch.setattr(front_module, "RequestContext", partial(RequestContext, **known))
        arguments = {"max_num_batched_tokens": most, "additional_config": {"mm_ext": config}}
        with opened(files, **arguments) as made:
            video = made.render("long.mp4").videos[0]
        return {key: video[key] for key in ("frames", "size", "lowered")}

    asked = Asked()
    engine = planned(512, elsewhere=asked)
    assert planned(1024) != engine
    assert planned(1024, item_tokens=asked.item_tokens) == engine
    # An encoder that takes less plans by itself; the engine encodes what is larger.
    assert planned(512, item_tokens=1024) == engine


def test_no_sound_of_a_video_is_counted_or_made_where_sound_comes_as_embeddings(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"mm_ext": CONFIG}
    with opened(files, model=str(checkpoint("qwen2_5_omni")), additional_config=config) as made:
        assert made.render("heard.mp4").trace.tokens["audio"]
        monkeypatch.setattr(planning, "embeds_sound", lambda _: True)
        assert not made.render("heard.mp4").trace.tokens.get("audio")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": {"pool": 2}}, r"mm_ext\.reduction.*as this server is set up.*reductions"),
        ({"total_tokens": 100}, r"mm_ext\.total_tokens.*as this server is set up.*max_frames"),
    ],
)
def test_what_needs_counting_is_refused(front: Front, options: dict[str, Any], words: str) -> None:
    with pytest.raises(VLLMValidationError, match=words):
        front.render("short.mp4", options=options)


def test_frames_are_as_asked(front: Front) -> None:
    (video,) = front.render("short.mp4", options={"max_frames": 4}).videos
    assert video["frames"] == 4
