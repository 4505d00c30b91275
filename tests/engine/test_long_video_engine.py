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
    size: dict[str, Any] = {"width": 64, "height": 48, "fps": 4, "gop": 20}
    make_clip(files / "long.mp4", duration=SECONDS, audio=sound, **size)
    make_clip(files / "other.mp4", duration=SECONDS, seed=1, **size)
    make_clip(files / "short.mp4", duration=4, seed=2, **size)
    make_clip(files / "recording.ts", duration=SECONDS, seed=3, **size)
    args = ["--allowed-local-media-path", str(files), "--max-model-len", "2048"]
    args += ["--limit-mm-per-prompt", '{"video": 4}', "--enable-prompt-tokens-details"]
    with serve(
        checkpoint("composer"),
        plugin=True,
        args=args,
        # vLLM compiles a function that counts log-probabilities, for longer than all tests run.
        env={"TORCH_COMPILE_DISABLE": "1"},
        additional_config={"mm_ext": CONFIG},
    ) as server:
        yield Served(server, server.client(), files)


def texts(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def numbers(windows: list[dict[str, Any]]) -> list[int]:
    return [window["window"] for window in windows]


def test_map_reduce_notes_every_window_once_and_usage_sums_all(served: Served) -> None:
    answer = served.ask("long.mp4", long_video={"strategy": "map_reduce"})
    block = answer["mm_ext"]["long_video"]
    assert block["strategy"] == "map_reduce"
    windows = block["windows"]
    assert numbers(windows) == list(range(WINDOWS))
    starts = [window["start"] for window in windows]
    assert starts == [number * (WINDOW_S - OVERLAP_S) for number in range(WINDOWS)]
    assert windows[-1]["end"] == pytest.approx(SECONDS, abs=0.5)
    assert all(window["note"] and not window["kept"] for window in windows)
    assert (block["failed"], block["left_out"]) == ([], [])
    per_window = [window["cost"]["prompt_tokens"] for window in windows]
    assert min(per_window) > 10
    assert block["cost"]["prompt_tokens"] >= sum(per_window)
    own = sum(answer["mm_ext"]["tokens"].values())
    assert answer["usage"]["prompt_tokens"] == own + block["cost"]["prompt_tokens"]
    assert answer["mm_ext"]["tokens"]["visual"] == 0, "the answer itself is about notes"


def test_a_second_question_about_the_same_video_takes_the_notes_that_are_there(
    served: Served,
) -> None:
    first = served.ask("long.mp4", long_video={"strategy": "map_reduce"})
    second = served.ask("long.mp4", text="How many?", long_video={"strategy": "auto"})
    block = second["mm_ext"]["long_video"]
    assert block["strategy"] == "map_reduce", "all windows are noted"
    assert all(window["kept"] for window in block["windows"])
    assert sum(window["cost"]["prompt_tokens"] for window in block["windows"]) == 0
    notes = [[w["note"] for w in a["mm_ext"]["long_video"]["windows"]] for a in (first, second)]
    assert notes[0] == notes[1]


def test_another_cache_salt_takes_no_kept_notes_and_gives_the_same_answer(served: Served) -> None:
    asked: dict[str, Any] = {"long_video": {"strategy": "map_reduce"}, "seed": 1}
    one, two = (served.ask("other.mp4", cache_salt=salt, **asked) for salt in ("a", "b"))
    blocks = [answer["mm_ext"]["long_video"] for answer in (one, two)]
    assert not any(window["kept"] for block in blocks for window in block["windows"])
    assert [w["note"] for w in blocks[0]["windows"]] == [w["note"] for w in blocks[1]["windows"]]
    assert texts(one) == texts(two)


def test_search_looks_at_all_windows_and_closely_at_few(served: Served) -> None:
    answer = served.ask("long.mp4", text="Where is it?", long_video={"strategy": "search"})
    block = answer["mm_ext"]["long_video"]
    windows = block["windows"]
    assert numbers(windows) == list(range(WINDOWS))
    assert all(0 <= window["relevance"] <= 1 for window in windows)
    close = [window for window in windows if window.get("close")]
    assert 1 <= len(close) <= CONFIG["long_video"]["close_windows"]  # type: ignore[index]
    again = served.ask("long.mp4", text="Where is it?", long_video={"strategy": "search"})
    assert [w["relevance"] for w in again["mm_ext"]["long_video"]["windows"]] == [
        window["relevance"] for window in windows
    ]
    assert again["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"] / 3
    assert texts(again) == texts(answer)


def test_rolling_tells_each_window_what_came_before(served: Served) -> None:
    answer = served.ask("other.mp4", long_video={"strategy": "rolling", "window_s": 50})
    windows = answer["mm_ext"]["long_video"]["windows"]
    tokens = [window["cost"]["prompt_tokens"] for window in windows]
    assert len(windows) == 5
    assert tokens[1] > tokens[0], "the same frames, and a note"


def test_a_video_that_fits_is_answered_in_one_pass_as_without_the_option(served: Served) -> None:
    plain = served.ask("short.mp4")
    auto = served.ask("short.mp4", long_video={})
    assert auto["mm_ext"].pop("long_video") == {"strategy": "single"}
    assert texts(auto) == texts(plain)
    assert auto["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert auto["mm_ext"]["videos"][0]["times"] == plain["mm_ext"]["videos"][0]["times"]


def test_a_stream_tells_its_progress_and_then_the_answer(served: Served) -> None:
    asked: dict[str, Any] = {"long_video": {"strategy": "map_reduce", "window_s": 40}}
    chunks = served.chunks("long.mp4", stream_options={"include_usage": True}, **asked)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    told = [chunk for chunk in chunks if "progress" in chunk.get("mm_ext", {})]
    assert chunks[: len(told)] == told
    progress = [chunk["mm_ext"]["progress"] for chunk in told]
    assert [(one["done"], one["total"]) for one in progress] == [(i + 1, 6) for i in range(6)]
    assert sorted(numbers(progress)) == list(range(6))
    assert all(chunk["choices"][0]["delta"] == {} for chunk in told)
    whole = served.ask("long.mp4", **asked)
    text = "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
    )
    assert text == texts(whole)
    block = chunks[-1]["mm_ext"]["long_video"]
    assert block["strategy"] == "map_reduce"
    assert chunks[-1]["usage"]["prompt_tokens"] == block["cost"]["prompt_tokens"] + sum(
        chunks[-1]["mm_ext"]["tokens"].values()
    )


def test_a_recording_that_has_grown_only_adds_windows(served: Served) -> None:
    whole = (served.files / "recording.ts").read_bytes()
    growing = served.files / "growing.ts"
    growing.write_bytes(whole[: int(0.7 * len(whole)) // 188 * 188])
    asked = {"long_video": {"strategy": "map_reduce"}}
    before = served.ask("growing.ts", **asked)["mm_ext"]["long_video"]["windows"]
    growing.write_bytes(whole)
    after = served.ask("growing.ts", **asked)["mm_ext"]["long_video"]["windows"]
    assert 5 < len(before) < len(after) == WINDOWS
    same = len(before) - 1
    assert [window["kept"] for window in after] == [True] * same + [False] * (WINDOWS - same)
    assert [w["note"] for w in after[:same]] == [w["note"] for w in before[:same]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_all_its_requests_with_it(served: Served, stream: bool) -> None:
    options = {"strategy": "map_reduce", "window_s": 4, "overlap_s": 0, "max_parallel": 2}
    body = json.dumps(
        served.body("long.mp4", long_video=options, cache_salt=str(stream), stream=stream)
    ).encode()
    host = served.server.url.removeprefix("http://")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    address, port = host.split(":")
    with socket.create_connection((address, int(port))) as client:
        client.sendall(head.encode() + body)
        if stream:
            received = b""
            while b'"progress"' not in received:
                received += client.recv(4096)
        until(lambda: served.in_engine() > 0)
        assert served.stats()["requests"] == 1
    until(lambda: served.stats()["requests"] == 0 and served.in_engine() == 0)
    assert served.ask("short.mp4")["choices"]


def test_more_requests_than_allowed_are_told_to_come_later(served: Served) -> None:
    options = {"strategy": "map_reduce", "window_s": 8}

    def post(number: int) -> httpx.Response:
        return served.post("other.mp4", long_video=options, cache_salt=f"busy {number}")

    # So many that the first are not answered before the last have come.
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(post, range(16)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes[:2] == [200, 200]
    assert codes[-1] == 503
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert "max_requests" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "best"}, ["mm_ext.long_video.strategy", "best", "map_reduce"]),
        ({"windows": 3}, ["mm_ext.long_video.windows"]),
        ({"window_s": 2}, ["mm_ext.long_video.window_s", "4"]),
        ({"window_s": 10, "overlap_s": 6}, ["mm_ext.long_video.overlap_s", "6", "5"]),
        ({"max_parallel": 9}, ["mm_ext.long_video.max_parallel", "9", "4"]),
        ({"fps": 20}, ["mm_ext.long_video.fps", "20", "8"]),
        ({"max_windows": 65}, ["mm_ext.long_video.max_windows", "65", "64"]),
        ({"strategy": "search", "max_windows": 4}, ["max_windows = 4", "window_s = "]),
    ],
)
def test_a_wrong_option_is_a_400_that_says_what_fits(
    served: Served, options: dict[str, Any], words: list[str], stream: bool
) -> None:
    refused = served.post("long.mp4", long_video=options, stream=stream)
    assert refused.status_code == 400
    for word in words:
        assert word in refused.json()["error"]["message"]


def test_a_request_that_long_video_cannot_answer_is_a_400_before_decoding(served: Served) -> None:
    jobs = json.loads(served.server.get("/mm_ext/stats"))["decode"]["jobs"]
    search: dict[str, Any] = {"long_video": {"strategy": "search"}}
    without_video = served.post(**search)
    assert without_video.status_code == 400
    assert "video_url" in without_video.json()["error"]["message"]
    body = served.body("long.mp4", **search)
    body["messages"][0]["content"][0]["video_url"] = None
    body["messages"][0]["content"][0]["uuid"] = "sent before"
    by_uuid = httpx.post(f"{served.server.url}/v1/chat/completions", json=body)
    assert by_uuid.status_code == 400
    without_room = served.post("long.mp4", **search, max_tokens=1950)
    assert without_room.status_code == 400
    assert "room for" in without_room.json()["error"]["message"]
    assert served.post("long.mp4", **search, model="other").status_code == 404
    for wrong in ({"n": 2}, {"top_logprobs": 99, "logprobs": True}, {"stop_token_ids": ["x"]}):
        refused = served.post("long.mp4", **search, **wrong)
        assert refused.status_code == 400, "of the answer, known before the windows"
    responses = httpx.post(
        f"{served.server.url}/v1/responses",
        json={"model": served.server.model, "input": "hi", "mm_ext": search},
    )
    assert responses.status_code == 400
    assert "/v1/chat/completions" in responses.json()["error"]["message"]
    assert json.loads(served.server.get("/mm_ext/stats"))["decode"]["jobs"] - jobs <= 1, "a probe"


def test_more_choices_and_several_videos_work(served: Served) -> None:
    asked: dict[str, Any] = {"long_video": {"strategy": "map_reduce", "window_s": 60}}
    answer = served.ask("long.mp4", "other.mp4", n=2, **{**asked, "temperature": 1.0})
    assert len(answer["choices"]) == 2
    windows = answer["mm_ext"]["long_video"]["windows"]
    assert {window["video"] for window in windows} == {0, 1}
