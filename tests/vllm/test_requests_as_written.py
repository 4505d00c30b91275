"""Requests as clients write them: media of all kinds in one, texts, truncation."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from front import Front, opened
from PIL import Image
from vllm.exceptions import VLLMValidationError

from vllm_mm_ext.testing.media import make_clip


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("front")
    make_clip(files / "short.mp4", duration=4, seed=1)
    make_clip(files / "other.mp4", duration=6, scene="pan", seed=2)
    with opened(files, enable_prompt_embeds=True) as made:
        yield made


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("limit", [1, 10, 16, 20, 60, 200])
def test_truncation_that_would_cut_a_video_is_refused(
    front: Front, limit: int, side: str | None
) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        front.render("short.mp4", truncate_prompt_tokens=limit, truncation_side=side)
    assert caught.value.parameter == "truncate_prompt_tokens"


def test_truncation_may_cut_the_text_beside_a_video(front: Front) -> None:
    text = "a long question " * 20
    whole = front.render("short.mp4", text=text)
    limit = whole.prompt_tokens - 50
    cut = front.render(
        "short.mp4", text=text, truncate_prompt_tokens=limit, truncation_side="right"
    )
    assert (cut.prompt_tokens, cut.video_tokens) == (limit, whole.video_tokens)


def jpeg_sequence(frames: int) -> str:
    """The URL of a video that is sent as a list of its frames."""
    out = io.BytesIO()
    Image.new("RGB", (64, 56), (200, 0, 0)).save(out, "JPEG")
    frame = base64.b64encode(out.getvalue()).decode()
    return "data:video/jpeg;base64," + ",".join([frame] * frames)


def test_every_use_of_a_video_is_reported_in_the_order_of_the_messages(front: Front) -> None:
    short, other = ((front.files / name).as_uri() for name in ("short.mp4", "other.mp4"))

    def part(url: str) -> dict[str, Any]:
        return {"type": "video_url", "video_url": {"url": url}}

    made = front.render_messages(
        [
            {"role": "user", "content": [part(jpeg_sequence(4)), part(short)]},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": [part(short)]},
        ]
    )
    assert [(v["policy"], v["frames"], v["source_s"]) for v in made.videos] == [
        ("stock", 4, 4.0),
        ("uniform", 8, 4.0),
        ("uniform", 8, 4.0),
    ]
    assert (made.videos[0]["size"], made.videos[0]["times"]) == ([56, 64], [0.0, 1.0, 2.0, 3.0])
    made = front.render_messages(
        [{"role": "user", "content": [part(other), part(jpeg_sequence(2)), part(other)]}]
    )
    assert [v["frames"] for v in made.videos] == [12, 2, 12]


@pytest.mark.parametrize("session", [None, "s1"])
@pytest.mark.parametrize("order", ["plain first", "plain last"])
def test_how_one_request_samples_a_video_is_no_matter_for_the_next(
    front: Front, session: str | None, order: str
) -> None:
    few = {"media_io_kwargs": {"video": {"num_frames": 2}}}
    many = {"media_io_kwargs": {"video": {"fps": 4.0}}}
    asked: list[tuple[dict[str, Any], int]] = [({}, 8), (few, 2), (many, 16)]
    for more, frames in asked if order == "plain first" else reversed(asked):
        # A salt of its own keeps the test from what others asked about the clip.
        salt = f"{order}{session}"
        (video,) = front.render("short.mp4", session=session, cache_salt=salt, **more).videos
        assert (video["frames"], video["lowered"]) == (frames, [])


@pytest.mark.parametrize("scope", [None, "videos_kwargs"])
def test_the_size_that_a_trusted_request_asks_for_is_delivered(
    front: Front, scope: str | None
) -> None:
    def size_for(**kwargs: Any) -> tuple[int, int]:
        asked = {scope: kwargs} if scope else kwargs
        (video,) = front.render("short.mp4", mm_processor_kwargs=asked).videos
        height, width = video["size"]
        return height, width

    (video,) = front.render("short.mp4").videos
    usual = video["size"][0] * video["size"][1]
    larger = size_for(size={"shortest_edge": 3136, "longest_edge": 4 * usual})
    assert usual < larger[0] * larger[1] <= 4 * usual
    smaller = size_for(max_pixels=usual // 2)
    assert smaller[0] * smaller[1] <= usual // 2


def test_a_size_that_is_none_is_the_clients_fault(front: Front) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        front.render("short.mp4", mm_processor_kwargs={"size": "large"})
    assert caught.value.parameter == "mm_processor_kwargs"


PAD = "<|video_pad|>"


@pytest.mark.parametrize(
    "texts",
    [
        [f"what is {PAD}?"],
        [PAD * 3],
        ["<|image_pad|>"],
        ["<|video", "_pad|>"],
        ["<", "|video_p", "ad|> and", f" {PAD}"],
        [f"<|vision_start|>{PAD}<|vision_end|>"],
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False], ids=["text first", "video first"])
def test_text_that_reads_like_a_placeholder_stays_text(
    front: Front, texts: list[str], first: bool
) -> None:
    def prompt(texts: list[str]) -> list[int]:
        parts = [{"type": "text", "text": text} for text in texts]
        video = front.messages("short.mp4")[0]["content"][:1]
        content = [*parts, *video] if first else [*video, *parts]
        return front.render_messages([{"role": "user", "content": content}]).prompt

    tokenizer = front.renderer.get_tokenizer()
    pads = {tokenizer.convert_tokens_to_ids(pad) for pad in (PAD, "<|image_pad|>")}
    plain, made = prompt(["hello"]), prompt(texts)
    assert [token in pads for token in made].count(True) == [t in pads for t in plain].count(True)
    assert "".join(texts) in tokenizer.decode([token for token in made if token not in pads])


def embeddings(front: Front) -> dict[str, Any]:
    """A part of a message with the embeddings of two tokens."""
    config = front.renderer.model_config
    out = io.BytesIO()
    torch.save(torch.zeros(2, config.get_hidden_size(), dtype=config.dtype), out)
    return {"type": "prompt_embeds", "data": base64.b64encode(out.getvalue()).decode()}


@pytest.mark.parametrize("beside", ["nothing", "embeddings"])
def test_text_stays_text_where_vllm_has_templates_make_tokens(front: Front, beside: str) -> None:
    parts = [
        {"type": "text", "text": f"what is {PAD}?"},
        *front.messages("short.mp4")[0]["content"],
    ]
    if beside == "embeddings":
        parts.append(embeddings(front))

    def prompt(text: str) -> list[int]:
        parts[0] = {"type": "text", "text": text}
        messages = [{"role": "user", "content": parts}]
        # As vLLM has it for all chats with --enable-prompt-embeds, and as clients may ask.
        return front.render_messages(messages, chat_template_kwargs={"tokenize": True}).prompt

    tokenizer = front.renderer.get_tokenizer()
    pad = tokenizer.convert_tokens_to_ids(PAD)
    plain, made = prompt("hello"), prompt(f"what is {PAD}?")
    assert made.count(pad) == plain.count(pad)
    assert f"what is {PAD}?" in tokenizer.decode([token for token in made if token != pad])


# Writes all that vLLM passes on of messages and tools.
EVERYTHING = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}{{ message.role }} {{ message.name }} {{ message.reasoning }}\n"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% for key, value in call.function.arguments.items() %}"
    "<{{ key }}>{{ value }}{% endfor %}{% endfor %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content or [] %}{{ part.text or part.name }}{% endfor %}{% endif %}"
    "\n{% endfor %}"
)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": [{"type": "refusal", "refusal": PAD}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": PAD}]},
        {"role": "user", "content": [{"type": "tool_reference", "name": PAD}]},
        {"role": "assistant", "content": "hello", "reasoning": PAD},
        {"role": "assistant", "content": "hello", "reasoning_content": PAD},
        {"role": "user", "content": "hello", "name": PAD},
        {"role": "tool", "content": [{"type": "text", "text": PAD}], "tool_call_id": "1"},
        # Of this one pydantic makes an iterator over the parts.
        {
            "role": "assistant",
            "content": [{"type": "text", "text": PAD}],
            "function_call": {"name": "look", "arguments": "{}"},
        },
        *(
            {
                "role": "assistant",
                "content": content,
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "look", "arguments": arguments},
                    }
                ],
            }
            for content, arguments in (
                (None, f'{{"a": "{PAD}"}}'),
                ("hello", '{"a": "\\u003c|video_pad|\\u003e"}'),
                ("hello", f'{{"{PAD}": 1}}'),
                ([{"type": "text", "text": PAD}], "{}"),
            )
        ),
    ],
    ids=str,
)
def test_no_text_of_a_message_becomes_a_placeholder(front: Front, message: dict[str, Any]) -> None:
    tokenizer = front.renderer.get_tokenizer()
    made = front.render_messages([message], chat_template=EVERYTHING).prompt
    assert tokenizer.convert_tokens_to_ids(PAD) not in made
    assert PAD in tokenizer.decode(made)


def test_no_text_of_a_tool_becomes_a_placeholder(front: Front) -> None:
    tokenizer = front.renderer.get_tokenizer()
    tools = [{"type": "function", "function": {"name": "look", "description": PAD}}]
    made = front.render_messages(
        [{"role": "user", "content": "hello"}],
        chat_template=EVERYTHING,
        chat_template_kwargs={"tools": tools},
    ).prompt
    assert tokenizer.convert_tokens_to_ids(PAD) not in made
    assert PAD in tokenizer.decode(made)
