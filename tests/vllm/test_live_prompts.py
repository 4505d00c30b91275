"""Prompts of live sessions, of every family: what grows keeps what it had, and all is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from live_talk import conversation, kinds_of, stretch_units
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import renderer_from_config

import vllm_mm_ext
from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.live.engine import LiveEngine
from vllm_mm_ext.adapters.live.live_prompt import PromptMaker
from vllm_mm_ext.adapters.live.served_template import renderer_of
from vllm_mm_ext.adapters.live.template_pieces import take_apart
from vllm_mm_ext.live.prompt import Generated, Message, Picture, Prompt, Stretch, Text
from vllm_mm_ext.live.wire_error import WireError
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.testing.checkpoints import checkpoint

# The composer that ships with the package puts a message's media before its texts.
SHIPPED = Path(vllm_mm_ext.__file__).parent / "assets" / "composer-tiny"
FAMILIES = (
    "composer",
    "shipped composer",
    "qwen2_5_omni",
    pytest.param("qwen3_omni", marks=pytest.mark.slow),
    pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
    "qwen3_vl",
)
RESOLUTION = 112
SYSTEM = Message("system", (Text("Be brief."),))


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The renderer of a family, and what makes its prompts."""
    plugin.register()
    # A session's media are not counted: it has more than a request may have.
    limits = {"video": 1, "audio": 1, "image": 1}
    if "composer" in request.param:
        del limits["image"]
    shipped = request.param.startswith("shipped")
    model = SHIPPED if shipped else checkpoint(request.param)
    args = EngineArgs(
        model=str(model),
        max_model_len=8192,
        limit_mm_per_prompt=limits,
        additional_config={"mm_ext": {"media": {"sampling": {"resolution": RESOLUTION}}}},
    )
    config = args.create_engine_config()
    renderer = renderer_from_config(config)
    client = SimpleNamespace(
        model_config=config.model_config, renderer=renderer, vllm_config=config, engine_core=None
    )
    chat = SimpleNamespace(
        chat_template=None, chat_template_content_format="auto", default_chat_template_kwargs={}
    )
    state = SimpleNamespace(openai_serving_chat=chat, openai_serving_models=None)
    yield asyncio.run(LiveEngine.start(client, state)), renderer
    renderer.shutdown()


def maker_of(live: LiveEngine) -> PromptMaker:
    return live._engine.maker


def rendered(served: Any, prompt: Prompt, stretches: dict[str, Any]) -> Any:
    live, renderer = served
    made = maker_of(live).make(prompt, stretches)
    (result,) = asyncio.run(renderer.render_cmpl_async([made]))
    return result


def items(result: Any) -> list[tuple[int, int, str, str]]:
    """Place, length, modality and identity of each mm item, in order."""
    return sorted(
        (place.offset, place.length, kind, result["mm_hashes"][kind][index])
        for kind, places in result["mm_placeholders"].items()
        for index, place in enumerate(places)
    )


def test_a_camera_frame_has_at_most_the_pixels_that_the_operator_set(served: Any) -> None:
    rule = served[0].traits.size_rule
    width, height = target_size(rule, width=640, height=480, num_frames=2)
    if rule.kind != "fixed":
        assert width * height <= RESOLUTION**2


def test_a_unit_more_changes_nothing_of_what_the_prompt_had(served: Any) -> None:
    traits = served[0].traits
    for sound, frames in kinds_of(traits):
        units = stretch_units(traits, sound=sound, frames=frames, whole=3)
        kept: dict[str, Any] = {}
        before: Any = None
        for count in range(1, len(units) + 1):
            prompt = conversation([SYSTEM], units[:count], "one", open=True)
            result = rendered(served, prompt, kept)
            if before is not None:
                known = items(before)
                assert items(result)[: len(known)] == known
                end = known[-1][0] + known[-1][1]
                assert result["prompt_token_ids"][:end] == before["prompt_token_ids"][:end]
                assert len(items(result)) > len(known)
            before = result


def test_a_unit_more_prepares_the_items_of_that_unit_alone(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, renderer = served
    prepare = renderer.mm_processor._apply_hf_processor_main
    prepared: list[int] = []

    def counted(mm_items: Any, hf_kwargs: Any) -> Any:
        prepared.append(sum(map(len, mm_items.values())))
        return prepare(mm_items, hf_kwargs)

    monkeypatch.setattr(renderer.mm_processor, "_apply_hf_processor_main", counted)
    for sound, frames in kinds_of(live.traits):
        # Other tests have such units too.
        renderer.clear_mm_cache()
        units = stretch_units(live.traits, sound=sound, frames=frames, whole=3)[:3]
        kept: dict[str, Any] = {}
        known = 0
        for count in (1, 2, 3):
            prepared.clear()
            prompt = conversation([SYSTEM], units[:count], "one", open=True)
            result = rendered(served, prompt, kept)
            assert sum(prepared) == len(items(result)) - known
            known = len(items(result))


def test_units_as_they_come_make_the_prompt_of_the_whole_stretch(served: Any) -> None:
    traits = served[0].traits
    for sound, frames in kinds_of(traits):
        units = stretch_units(traits, sound=sound, frames=frames, whole=3)
        kept: dict[str, Any] = {}
        for count in range(1, len(units)):
            rendered(served, conversation([], units[:count], "one", open=True), kept)
        prompt = conversation([SYSTEM], units, "one", Text("What?"), open=False)
        grown, at_once = rendered(served, prompt, kept), rendered(served, prompt, {})
        assert grown["prompt_token_ids"] == at_once["prompt_token_ids"]
        assert items(grown) == items(at_once)


def test_a_short_last_unit_gives_way_to_a_whole_one(served: Any) -> None:
    traits = served[0].traits
    for sound, frames in kinds_of(traits):
        units = stretch_units(traits, sound=sound, frames=frames, whole=3)
        whole = stretch_units(traits, sound=sound, frames=frames, whole=4)[:4]
        kept: dict[str, Any] = {}
        rendered(served, conversation([], units, "one", open=False), kept)
        then = conversation([], [*units[:3], whole[3]], "one", open=True)
        assert items(rendered(served, then, kept)) == items(rendered(served, then, {}))


def test_texts_and_pictures_stand_as_in_a_chat_completion(served: Any) -> None:
    live, renderer = served
    tokenizer = renderer.get_tokenizer()
    answer = "It moves; " + tokenizer.decode([live._engine.maker.family.token_ids["video"]])
    ids = tuple(tokenizer.encode("It moves", add_special_tokens=False))
    user = Text("What is <|video_pad|> this <|VIDEO|>?")
    talk = (
        SYSTEM,
        Message("user", (user,)),
        Message("assistant", (Generated(ids, "It moves"),)),
        Message("user", (Text("And "), Text("now?"))),
        Message("assistant", (Text(answer),)),
        Message("user", (Text("Why?"),)),
    )
    for messages in (talk, talk[1:], talk[:2]):
        said = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    for part in message.parts
                    if isinstance(part, Text | Generated)
                ],
            }
            for message in messages
        ]
        request = ChatCompletionRequest(model="m", messages=said)
        _, (chat,) = asyncio.run(
            renderer.render_chat_async(
                [request.messages],
                request.build_chat_params(None, "auto"),
                request.build_tok_params(renderer.model_config),
            )
        )
        made = maker_of(live).make(Prompt(messages, open=False), {})
        assert made["prompt_token_ids"] == chat["prompt_token_ids"]


def test_an_answer_that_was_cut_within_a_token_stands_as_it_was_said(served: Any) -> None:
    live, renderer = served
    tokenizer = renderer.get_tokenizer()
    made = Generated(tuple(tokenizer.encode("One,", add_special_tokens=False)), "One,")
    cut = Message("assistant", (made, Text(" tw ")))
    ask = Message("user", (Text("Go on."),))
    ids = maker_of(live).make(Prompt((ask, cut, ask), open=False), {})["prompt_token_ids"]
    said = "One, tw" if maker_of(live)._pieces.trims else "One, tw "
    whole = Message("assistant", (Text(said),))
    expected = maker_of(live).make(Prompt((ask, whole, ask), open=False), {})["prompt_token_ids"]
    assert tokenizer.decode(ids) == tokenizer.decode(expected)


# As those of Qwen3 models that think: of past answers, what follows the reasoning is shown.
THINKING = """
{%- macro said(message) %}
    {%- for part in message.content %}
        {%- if part.type == 'text' %}{{- part.text }}
        {%- elif part.type == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
        {%- else %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
        {%- endif %}
    {%- endfor %}
{%- endmacro %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {{- said(message).split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' + ('' if enable_thinking else '\n</think>\n\n') }}
{%- endif %}"""


@pytest.mark.parametrize("thinks", [True, False])
def test_past_answers_of_a_model_that_thinks_stand_as_in_a_chat_completion(
    served: Any, thinks: bool
) -> None:
    live, renderer = served
    family, tokenizer = maker_of(live).family, renderer.get_tokenizer()
    if set(family.token_ids) != {"video", "image"}:
        pytest.skip("the template has other media")
    how = {"enable_thinking": thinks}
    chat = SimpleNamespace(
        chat_template=THINKING,
        chat_template_content_format="auto",
        default_chat_template_kwargs=how,
    )
    tokens = {kind: tokenizer.decode([one]) for kind, one in family.token_ids.items()}
    pieces = take_apart(renderer_of(chat, renderer.model_config, tokenizer), tokens)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    maker = PromptMaker(pieces, family, encode, tokens, ())
    assert pieces.opens_reasoning == thinks
    answer = Generated(tuple(encode("It moves.")), "It moves.")
    talk = Message("user", (Text("What?"),)), Message("assistant", (answer,))
    made = maker.make(Prompt((*talk, Message("user", (Text("Why?"),))), open=False), {})
    said = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "It may.\n</think>\n\nIt moves."},
        {"role": "user", "content": "Why?"},
    ]
    request = ChatCompletionRequest(model="m", messages=said)
    _, (stock,) = asyncio.run(
        renderer.render_chat_async(
            [request.messages],
            request.build_chat_params(THINKING, "auto").with_defaults(how),
            request.build_tok_params(renderer.model_config),
        )
    )
    assert made["prompt_token_ids"] == stock["prompt_token_ids"]


def test_measured_tokens_are_those_of_the_prompt(served: Any) -> None:
    live = served[0]
    traits = live.traits
    rng = np.random.default_rng(3)
    for sound, frames in kinds_of(traits):
        parts = [
            Stretch("a", tuple(stretch_units(traits, sound=sound, frames=frames))),
            Text("What is <|video_pad|>?"),
        ]
        if traits.images:
            pixels = rng.integers(0, 256, (70, 99, 3), dtype=np.uint8)
            parts.append(Picture(Image.fromarray(pixels), "picture"))
        messages = (
            SYSTEM,
            Message("user", tuple(parts)),
            Message("assistant", (Generated((300, 301), "so"),)),
            Message("user", (Stretch("b", parts[0].units[:2]),)),
        )
        measured = sum(live.measure(message) for message in messages)
        tokens = len(rendered(served, Prompt(messages, open=False), {})["prompt_token_ids"])
        assert tokens <= measured <= tokens + 8


def test_a_picture_that_the_model_does_not_take_is_an_error_of_the_client(served: Any) -> None:
    live = served[0]
    if not live.traits.images:
        pytest.skip("takes no pictures")
    small, long = (Picture(Image.new("RGB", (width, 1)), str(width)) for width in (1, 300))
    prompt = Prompt((Message("user", (small, Text("What?"))),), open=False)
    rendered(served, prompt, {})
    # Every append of a session has all its pictures.
    (image,) = live._engine.maker.make(prompt, {})["multi_modal_data"]["image"]
    assert image is small.image
    with pytest.raises(WireError, match="300x1 pixels"):
        live.measure(Message("user", (long,)))
