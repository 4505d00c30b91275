"""A follow-up whose server has died: one that shares its encoder outputs encodes nothing again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import as_flags, sharing
from vllm_mm_ext.testing.media import Tone, make_clip
from vllm_mm_ext.testing.server import Server, serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ARGS = ("--max-model-len", "4096", "--max-num-seqs", "4", "--dtype", "float32")


def test_a_follow_up_finds_the_outputs_of_a_server_that_died(tmp_path: Path) -> None:
    clip = make_clip(
        tmp_path / "clip.mp4",
        duration=4.0,
        fps=10,
        width=168,
        height=112,
        audio=[Tone(440.0, 0.0, 4.0)],
    ).path

    def server() -> Any:
        return serve(
            checkpoint("qwen2_5_omni"),
            plugin=True,
            args=[
                *ARGS,
                *("--allowed-local-media-path", str(tmp_path)),
                *as_flags(sharing("ec_both", tmp_path / "outputs")),
            ],
            additional_config={"mm_ext": {"segments": {"tokens": 64}}},
        )

    def answer(asked: Server, question: str) -> str:
        content = [
            {"type": "video_url", "video_url": {"url": clip.as_uri()}},
            {"type": "text", "text": question},
        ]
        messages: Any = [{"role": "user", "content": content}]
        found = asked.client().chat.completions.create(
            model="model",
            messages=messages,
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return str(found.choices[0].message.content)

    with server() as first:
        answer(first, "What happens?")
        assert first.metric("mm_ext_encoder_items_total") > 2
        expected = answer(first, "And then?")
        os.kill(first.pid, signal.SIGKILL)
    with server() as second:
        assert answer(second, "And then?") == expected
        assert second.metric("mm_ext_encoder_items_total") == 0
        assert second.metric("mm_ext_encoder_transfer_items_total") > 2
