"""With stock's frame choice at native size, the plugin changes no answer of any family."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vllm_mm_ext.testing.checkpoints import FAMILIES
from vllm_mm_ext.testing.server import Server

TOKENS = 16
# One of each kind; videos of every family meet stock's in ``test_segments_engine`` and
# ``test_per_frame_engine``.
SERVED = (
    "qwen2_5_omni",
    pytest.param("llava_onevision", marks=pytest.mark.slow),
    pytest.param("qwen2_audio", marks=pytest.mark.slow),
)

# Name of a case: the messages' media in order, then which turn of a conversation it is.
CASES: Mapping[str, tuple[tuple[str, ...], int]] = {
    "text": ((), 1),
    "image": (("one.png",), 1),
    "video": (("shapes.mp4",), 1),
    "video, turn 2": (("shapes.mp4",), 2),
    "video, turn 3": (("shapes.mp4",), 3),
    "long GOP with B frames": (("pan.mp4",), 1),
    "mpeg4 in avi": (("cuts.avi",), 1),
    "video with a sound track": (("sound.mp4",), 1),
    "two videos": (("shapes.mp4", "pan.mp4"), 1),
    "audio": (("low.wav",), 1),
    "audio, turn 2": (("low.wav",), 2),
    "two sounds": (("low.wav", "high.wav"), 1),
    "image and video": (("two.png", "pan.mp4"), 1),
    "video and sound": (("shapes.mp4", "high.wav"), 1),
}
KINDS = {".png": "image", ".mp4": "video", ".avi": "video", ".wav": "audio"}


def media_part(file: Path) -> dict[str, Any]:
    kind = KINDS[file.suffix]
    if kind == "audio":
        data = base64.b64encode(file.read_bytes()).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": file.as_uri()}}


def conversation(media: Path, files: tuple[str, ...], turn: int) -> list[dict[str, Any]]:
    parts = [media_part(media / name) for name in files]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "What happens?"}]}
    ]
    for number in range(1, turn):
        messages.append({"role": "assistant", "content": "There are shapes."})
        messages.append({"role": "user", "content": f"And then, part {number}?"})
    return messages


def greedy_tokens(server: Server, messages: list[dict[str, Any]]) -> tuple[list[int], int]:
    """Token ids of the greedy answer, and the length of the prompt in tokens."""
    with server.client(timeout=120.0) as client:
        answer = client.chat.completions.create(
            model=server.model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=TOKENS,
            temperature=0.0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    assert answer.usage is not None
    return answer.choices[0].token_ids, answer.usage.prompt_tokens  # type: ignore[attr-defined]


def takes(family: str, files: tuple[str, ...]) -> bool:
    return {KINDS[Path(file).suffix] for file in files} <= FAMILIES[family].modalities


# A single argument, so that pytest runs all tests of a family on one pair of servers.
@pytest.mark.engine
@pytest.mark.parametrize("golden_pair", SERVED, indirect=True)
def test_greedy_answers_equal_stocks(golden_pair: Any, golden_media: Path) -> None:
    expected, got = {}, {}
    for case, (files, turn) in CASES.items():
        if takes(golden_pair.family, files):
            messages = conversation(golden_media, files, turn)
            expected[case] = greedy_tokens(golden_pair.stock, messages)
            got[case] = greedy_tokens(golden_pair.plugin, messages)
    assert all(len(tokens) == TOKENS for tokens, _ in expected.values())
    assert got == expected


@pytest.mark.engine
@pytest.mark.parametrize("golden_pair", SERVED, indirect=True)
def test_answers_depend_on_the_media(golden_pair: Any, golden_media: Path) -> None:
    """Otherwise equal answers would prove nothing."""
    for pair in (("one.png", "two.png"), ("shapes.mp4", "pan.mp4"), ("low.wav", "high.wav")):
        if takes(golden_pair.family, pair):
            first, second = (
                greedy_tokens(golden_pair.stock, conversation(golden_media, (name,), 1))[0]
                for name in pair
            )
            assert first != second, pair
