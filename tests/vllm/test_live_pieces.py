"""What prompts of sessions are made of: the chat template in pieces, sound whose features stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from omni_reference import make_processor

from vllm_mm_ext.adapters.live.growing import Features
from vllm_mm_ext.adapters.live.live_prompt import PromptMaker
from vllm_mm_ext.adapters.live.template_pieces import TemplateError, take_apart
from vllm_mm_ext.adapters.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration
from vllm_mm_ext.live.prompt import Message, Text
from vllm_mm_ext.media.payload import Waveform

RATE = 16_000
UNIT = 2 * RATE


def chatml(messages: Sequence[Mapping[str, Any]], asking: bool) -> str:
    """A template as most models have it."""
    text = ""
    for message in messages:
        parts = [
            part["text"] if part["type"] == "text" else "<v>[video]</v>"
            for part in message["content"]
        ]
        text += f"<{message['role']}>{''.join(parts)}</>\n"
    return text + ("<assistant>" if asking else "")


def test_pieces_of_a_template_make_what_the_template_makes() -> None:
    pieces = take_apart(chatml, {"video": "[video]"})
    assert pieces.first["user"] == "<user>"
    assert pieces.between["user", "assistant"] == "</>\n<assistant>"
    assert pieces.between["user", "system"] == "</>\n<system>"
    assert pieces.asking["user"] == "</>\n<assistant>"
    assert (pieces.separator, pieces.media["video"]) == ("", "<v>[video]</v>")
    assert not pieces.media_first
    assert not pieces.trims


def test_a_template_may_put_media_first_and_trim_texts() -> None:
    def leading(messages: Sequence[Mapping[str, Any]], asking: bool) -> str:
        text = ""
        for message in messages:
            texts = [part["text"].strip() for part in message["content"] if "text" in part]
            count = len(message["content"]) - len(texts)
            text += f"<{message['role']}>" + count * "[video]" + "|".join(texts)
        return text + ("<assistant>" if asking else "")

    pieces = take_apart(leading, {"video": "[video]"})
    assert (pieces.separator, pieces.media["video"]) == ("|", "[video]")
    assert pieces.media_first
    assert pieces.trims


@pytest.mark.parametrize(
    ("extra", "opens"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)]
)
def test_a_template_tells_whether_answers_begin_with_reasoning_and_past_answers_have_none(
    extra: str, opens: bool
) -> None:
    pieces = take_apart(
        lambda messages, asking: chatml(messages, asking) + extra * asking, {"video": "[video]"}
    )
    assert pieces.opens_reasoning == opens
    assert pieces.asking["user"] == "</>\n<assistant>" + extra
    assert pieces.between["user", "assistant"] == "</>\n<assistant>"


def test_turns_that_a_template_refuses_are_left_out_and_needed_ones_must_be_there() -> None:
    def strict(messages: Sequence[Mapping[str, Any]], asking: bool) -> str:
        if [message["role"] for message in messages][-1:] == ["assistant"]:
            raise ValueError("the last message must be the user's")
        return chatml(messages, asking)

    pieces = take_apart(strict, {"video": "[video]"})
    assert ("user", "assistant") in pieces.between
    assert "assistant" not in pieces.asking
    with pytest.raises(TemplateError, match="takes no turns"):
        take_apart(lambda messages, asking: str(1 // 0), {"video": "[video]"})  # noqa: ARG005


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("<assistant>", "", 1), "depending on the turn"),
        (lambda text: text.replace("mmext1mark", ""), "leaves out or reorders"),
        (lambda text: text + "mmext0mark", "repeats"),
        (lambda text: text.replace("[video]", "[video][video]"), "one video"),
        (lambda text: text.replace("[video]", "1: [video]", 1), "of two"),
        (lambda text: text.replace("[video]", "", 1), "of one video"),
    ],
)
def test_a_template_that_cannot_be_taken_apart_is_refused(change: Any, says: str) -> None:
    with pytest.raises(TemplateError, match=says):
        take_apart(lambda messages, asking: change(chatml(messages, asking)), {"video": "[video]"})


def test_a_text_of_any_length_and_of_many_tokens_is_tokenized_and_short_ones_are_once() -> None:
    encoded: list[str] = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return [7] * 3 * len(text)

    pieces = take_apart(chatml, {"video": "[video]"})
    maker = PromptMaker(pieces, None, encode, {"video": "[video]"}, ())  # type: ignore[arg-type]
    for text in ("ab", "\u4e00" * 1_500_000):
        message = Message("assistant", (Text(text),))
        for _ in range(2):
            assert maker.measure(message) == 3 * len(text)
    assert [text[:2] for text in encoded] == ["ab", *["\u4e00" * 2] * 2]


@pytest.fixture(scope="module")
def omni() -> Any:
    return make_processor("qwen2_5_omni", Qwen2_5OmniForConditionalGeneration)


def grown(omni: Any, sound: Any) -> Any:
    features = Features(RATE, omni.track_features, 640)
    for begin in range(0, len(sound), UNIT):
        features.add(sound[begin : begin + UNIT])
    return features


def test_features_of_units_are_those_of_the_track_but_for_the_last_frame_of_each(omni: Any) -> None:
    rng = np.random.default_rng(0)
    sound = (0.1 * rng.standard_normal(5 * UNIT)).astype(np.float32)
    sound[:RATE] *= 3
    whole = omni.track_features(Waveform(sound, digest="", rate=RATE))
    track = grown(omni, sound).track()
    assert track is not None
    assert len(track) == len(sound)
    differs = (track.mel - whole).abs().amax(dim=0) > 1e-4
    assert set(np.flatnonzero(differs.numpy()) % 200) <= {199}


def test_louder_sound_changes_no_unit_before_it(omni: Any) -> None:
    rng = np.random.default_rng(1)
    sound = (0.01 * rng.standard_normal(4 * UNIT)).astype(np.float32)
    sound[3 * UNIT :] *= 50
    first, whole = grown(omni, sound[: 3 * UNIT]).items(), grown(omni, sound).items()
    assert [one.digest for one in whole[:3]] == [one.digest for one in first]


def test_a_unit_that_is_taken_back_leaves_no_trace(omni: Any) -> None:
    rng = np.random.default_rng(2)
    sound = rng.standard_normal(3 * UNIT).astype(np.float32)
    features = grown(omni, sound[: 2 * UNIT])
    features.add(9 * sound[: UNIT // 3])
    features.keep(2)
    features.add(sound[2 * UNIT :])
    assert [one.digest for one in features.items()] == [
        one.digest for one in grown(omni, sound).items()
    ]
