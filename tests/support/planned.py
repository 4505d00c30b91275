"""A server whose requests carry options, as the tests see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from vllm_mm_ext.testing.server import Server


@dataclass(frozen=True)
class PlannedServer:
    """A server with the plugin whose requests carry options, and the clips it may read."""

    server: Server
    client: openai.OpenAI
    files: Path

    def messages(self, *names: str, text: str = "What is this?") -> list[Any]:
        """One user message with the named clips and a text."""
        parts: list[Any] = [
            {"type": "video_url", "video_url": {"url": (self.files / name).as_uri()}}
            for name in names
        ]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
