"""Questions about videos that do not fit, window by window, through a real server."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_clip
from vllm_mm_ext.testing.server import Server, serve

pytestmark = pytest.mark.engine

SECONDS = 200
WINDOW_S, OVERLAP_S = 20, 2
WINDOWS = 11
CONFIG = {
    "media": {"sampling": {"fps": 1.0, "max_frames": 32, "min_frames": 2}},
    "reports": {"cache_hits": True},
    "long_video": {
        "window_s": WINDOW_S,
        "overlap_s": OVERLAP_S,
        "max_windows": 64,
        "max_requests": 2,
        "note_tokens": 12,
        "select_tokens": 400,
        "coarse_frames": 4,
        "close_fps": 2.0,
        "close_windows": 3,
    },
}


@dataclass(frozen=True)
class Served:
    """The server and the videos it may read."""

    server: Server
    client: openai.OpenAI
    files: Path

    def body(self, *names: str, text: str = "What happens?", **more: Any) -> dict[str, Any]:
        """A request about videos; ``long_video`` and the other fields as given."""
        parts: list[Any] = [
            {"type": "video_url", "video_url": {"url": (self.files / name).as_uri()}}
            for name in names
        ]
        options = {"long_video": more.pop("long_video")} if "long_video" in more else {}
        return {
            "model": self.server.model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "max_tokens": 8,
            "temperature": 0,
            **({"mm_ext": options} if options else {}),
            **more,
        }

    def post(self, *names: str, route: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
        body = self.body(*names, **more)
        return httpx.post(self.server.url + route, json=body, timeout=120)

    def ask(self, *names: str, **more: Any) -> dict[str, Any]:
        response = self.post(*names, **more)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def chunks(self, *names: str, **more: Any) -> list[dict[str, Any]]:
        response = self.post(*names, stream=True, **more)
        assert response.status_code == 200, response.text
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def in_engine(self) -> int:
        """Requests in the engine, running or waiting."""
        names = r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$"
        return int(sum(map(float, re.findall(names, self.server.get("/metrics"), re.MULTILINE))))

    def stats(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.server.get("/mm_ext/stats"))["long_video"]
        return found


def until(condition: Any, seconds: float = 30.0) -> float:
    """Wait for a condition; returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    files = tmp_path_factory.mktemp("long")
    sound = [Tone(440.0, 50.0, 55.0)]
    size = {"width": 64, "height": 48, "fps": 4, "gop": 20}
    make_clip(files / "long.mp4", duration=SECONDS, audio=sound, **size)
    make_clip(files / "other.mp4", duration=SECONDS, seed=1, **size)
    make_clip(files / "short.mp4", duration=4, seed=2, **size)
    make_clip(files / "recording.ts", duration=SECONDS, seed=3, **size)
    args = ["--allowed-local-media-path", str(files), "--max-model-len", "2048"]
    args += ["--limit-mm-per-prompt", '{"video": 4}', "--enable-prompt-tokens-details"]
    with serve(
        checkpoint("composer"), plugin=True, args=args, additional_config={"mm_ext": CONFIG}
    ) as server:
        yield Served(server, server.client(), files)


def test_map_reduce(served: Served) -> None:
    try:
        answer = served.ask("long.mp4", long_video={"strategy": "map_reduce"})
    finally:
        Path("/tmp/wt/serve.log").write_text(served.server.log.read_text())
    print(json.dumps(answer)[:6000])
