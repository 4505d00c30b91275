"""A composer behind ``vllm serve`` with the shipped configuration: what requests may ask of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

import vllm_mm_ext
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip
from vllm_mm_ext.testing.server import Server, serve

pytestmark = pytest.mark.engine

CONFIG = Path(vllm_mm_ext.__file__).parent / "assets" / "composer-tiny" / "serve.yaml"
SECONDS = 6
FRAMES = 4 * SECONDS
SIDE = 4
# Of the tiny checkpoint: windows of 2 s, 80 ms a token.
AUDIO_TOKENS = 25 * SECONDS // 2
# A compressed track ends a little after the sound.
CODEC_TOKENS = 2


@dataclass(frozen=True)
class Served:
    """The server and the files it may read."""

    server: Server
    client: openai.OpenAI
    files: Path

    def ask(self, *names: str, session: str | None = None, **options: Any) -> Any:
        """The answer to a question about some files, with an `mm_ext` block."""
        kinds = {".mp4": "video_url", ".wav": "audio_url"}
        parts: list[Any] = [
            {"type": kind, kind: {"url": (self.files / name).as_uri()}}
            for name in names
            for kind in [kinds[Path(name).suffix]]
        ]
        return self.client.chat.completions.create(
            model=self.server.model,
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}],
            max_tokens=4,
            temperature=0,
            extra_body={"mm_ext": options} | ({"session_id": session} if session else {}),
        )

    def tokens(self, *names: str, **options: Any) -> dict[str, int]:
        """Prompt tokens by kind, as the answer reports them."""
        reported: dict[str, int] = self.ask(*names, **options).mm_ext["tokens"]
        return reported


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    files = tmp_path_factory.mktemp("composer")
    tone = [Tone(440.0, 0.0, SECONDS)]
    make_clip(files / "sound.mp4", duration=SECONDS, audio=tone, seed=1)
    make_clip(files / "silent.mp4", duration=SECONDS, seed=2)
    make_audio(files / "tone.wav", duration=3.0, tones=tone)
    args = ["--config", str(CONFIG), "--allowed-local-media-path", str(files)]
    with serve(checkpoint("composer"), plugin=True, args=args) as server:
        yield Served(server, server.client(), files)


def test_a_video_with_its_sound_gets_the_default_reduction_of_the_checkpoint(
    served: Served,
) -> None:
    block = served.ask("sound.mp4").mm_ext
    (video,) = block["videos"]
    assert (video["reduction"]["pool"], video["reduction"]["temporal"]) == (2, 4)
    assert video["frames"] == FRAMES
    visual = math.ceil(FRAMES / 4) * (SIDE // 2) ** 2
    assert block["tokens"]["visual"] == visual
    assert AUDIO_TOKENS <= block["tokens"]["audio"] <= AUDIO_TOKENS + CODEC_TOKENS


@pytest.mark.parametrize(
    ("reduction", "visual"),
    [
        ({}, FRAMES * SIDE**2),
        ({"pool": 2}, FRAMES * SIDE**2 // 4),
        ({"temporal": 3}, FRAMES // 3 * SIDE**2),
        ({"static": "prune", "keep": 0.5}, FRAMES * SIDE**2 // 2),
    ],
)
def test_a_request_may_ask_for_what_the_checkpoint_declares(
    served: Served, reduction: dict[str, Any], visual: int
) -> None:
    tokens = served.tokens("silent.mp4", reduction=reduction)
    assert (tokens["visual"], tokens["audio"]) == (visual, 0)


@pytest.mark.parametrize("reduction", [{"pool": 3}, {"pool": 2, "static": "prune", "keep": 0.5}])
def test_anything_else_is_a_400_that_names_what_is_declared(
    served: Served, reduction: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask("silent.mp4", reduction=reduction)
    assert caught.value.param == "mm_ext.reduction"
    assert "pool 1, temporal 1; pool 2, temporal 1; pool 1, temporal 3" in str(caught.value)


def test_a_budget_is_met_with_a_declared_reduction(served: Served) -> None:
    whole = served.tokens("silent.mp4", reduction={})["visual"]
    options = {"reduction": {}, "floor": {"frames": FRAMES}, "total_tokens": whole // 2}
    block = served.ask("silent.mp4", **options).mm_ext
    (video,) = block["videos"]
    assert (video["reduction"]["pool"], video["reduction"]["temporal"]) == (2, 1)
    assert video["lowered"][0]["what"] == "reduction"
    assert block["tokens"]["visual"] <= whole // 2


def test_two_videos_and_a_sound_are_counted_by_kind(served: Served) -> None:
    tokens = served.tokens("sound.mp4", "silent.mp4", "tone.wav")
    visual = 2 * math.ceil(FRAMES / 4) * (SIDE // 2) ** 2
    # Windows of 2 s and 1 s, the second with its own last token.
    assert tokens["visual"] == visual
    assert 0 <= tokens["audio"] - (AUDIO_TOKENS + 25 + 13) <= CODEC_TOKENS


def test_the_engine_publishes_its_load_to_the_api_server(served: Served) -> None:
    served.ask("silent.mp4")
    (load,) = json.loads(served.server.get("/mm_ext/stats"))["engines"].values()
    assert (load["running"], load["waiting"], load["kv_usage"]) == (0, 0, 0)
    assert load["backlog_tokens"] == load["backlog_s"] == 0
    # What the video left for its next question.
    assert 0 < load["kv_pressure"] < 1
    assert load["itl_s"] > 0
    assert load["slots"] >= 1


def test_a_second_question_finds_the_first(served: Served) -> None:
    first = served.ask("sound.mp4", reduction={}, session="a")
    second = served.ask("sound.mp4", reduction={}, session="a")
    cached = second.usage.prompt_tokens_details.cached_tokens
    # Whole blocks, of up to 128 tokens.
    assert cached > first.usage.prompt_tokens - 128
    assert second.choices[0].message.content == first.choices[0].message.content
