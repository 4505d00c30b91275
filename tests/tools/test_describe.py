"""``vllm-mm describe`` against a server that replays recorded answers about long videos."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from damaged_files import damage
from typer.testing import CliRunner, Result

from tests.support.html_page import Page
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.tools.cli import describe_request
from vllm_mm_ext.tools.cli.describe_request import Source
from vllm_mm_ext.tools.cli.main import app

runner = CliRunner(env={"COLUMNS": "300"})

WINDOWS: list[dict[str, Any]] = [
    {"video": 0, "window": 0, "start": 0.0, "end": 6.0, "note": "[0:00:00] red circle left"},
    {
        "video": 0,
        "window": 1,
        "start": 4.0,
        "end": 10.0,
        "note": "[0:00:04] green bar up; [0:00:05] blue flash",
        "relevance": 0.93,
        "close": True,
    },
    {"video": 0, "window": 2, "start": 8.0, "end": 12.0, "failed": "took longer than 60 s"},
]
ANSWERED = {
    "videos": [],
    "long_video": {
        "strategy": "search",
        "windows": WINDOWS,
        "failed": [{"video": 0, "window": 2, "start": 8.0, "end": 12.0}],
        "left_out": [],
        "cited": [5.0],
        "cost": {"prompt_tokens": 900, "completion_tokens": 30},
    },
}


class Replay:
    """A server of ``/v1`` that answers in a fixed way and keeps what it was asked.

    Attributes:
        url: Its base URL.
        requests: Bodies of the chat completions.
        keys: Authorization headers of all requests.
        lost: Set once a client has closed its connection before the end of an answer.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lost = threading.Event()
        self.answer = "At 0:00:05."
        self.block: dict[str, Any] | None = ANSWERED
        self.refuses_files = False
        self.error_in_stream = False
        self.never_ends = False
        self.is_a_web_page = False
        replay = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                replay.keys.append(self.headers["Authorization"])
                if replay.is_a_web_page:
                    self._html()
                    return
                self._json(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

            def do_POST(self) -> None:
                replay.keys.append(self.headers["Authorization"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                replay.requests.append(body)
                if replay.is_a_web_page:
                    self._html()
                    return
                if replay.refuses_files and replay.sent_url().startswith("file:"):
                    message = "Cannot load local files without `--allowed-local-media-path`."
                    self._json(400, {"error": {"message": message, "code": 400}})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    for event in replay.events():
                        self.wfile.write(f"data: {event}\n\n".encode())
                except OSError:
                    replay.lost.set()

            def _html(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(b"<!doctype html>\n<title>Hello</title>\n")

            def _json(self, status: int, value: dict[str, Any]) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def sent_url(self) -> str:
        url: str = self.requests[-1]["messages"][0]["content"][0]["video_url"]["url"]
        return url

    def events(self) -> Iterator[str]:
        for done, window in enumerate(WINDOWS, 1):
            progress = {"done": done, "total": len(WINDOWS), **window}
            yield _chunk({}, {"progress": progress})
        if self.never_ends:
            yield _chunk({"content": "At"})
        while self.never_ends:
            time.sleep(0.01)
            yield _chunk({})
        if self.error_in_stream:
            yield json.dumps({"error": {"message": "all 3 windows failed", "code": 500}})
            return
        for piece in re.findall(r".{1,4}", self.answer, re.DOTALL):
            yield _chunk({"content": piece})
        yield _chunk({}, self.block)
        yield "[DONE]"


def _chunk(delta: dict[str, Any], block: dict[str, Any] | None = None) -> str:
    chunk: dict[str, Any] = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "tiny",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }
    return json.dumps(chunk if block is None else {**chunk, "mm_ext": block})


@pytest.fixture
def replay() -> Iterator[Replay]:
    served = Replay()
    thread = threading.Thread(target=served.server.serve_forever, args=(0.01,))
    thread.start()
    yield served
    served.server.shutdown()
    served.server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("describe") / "a <b> & c.mp4"
    make_clip(path, width=160, height=90, duration=12, scene="shapes", fps=10, gop=20)
    return path


def describe(replay: Replay, *arguments: object) -> Result:
    # A URL without a path is that of a server: `/v1` is added.
    url = replay.url.removesuffix("/v1")
    return runner.invoke(app, ["describe", "--url", url, *map(str, arguments)])


def test_a_question_is_answered_on_stdout_and_windows_without_notes_are_named_on_stderr(
    replay: Replay, clip: Path
) -> None:
    result = describe(replay, clip, "--question", "When is the blue flash?")
    assert result.exit_code == 0, result.output
    assert result.stdout == "At 0:00:05.\n"
    assert "1 windows have no note: 0:00:08: took longer than 60 s" in result.stderr
    (request,) = replay.requests
    assert request["model"] == "tiny"
    assert request["mm_ext"] == {"long_video": {}}
    assert request["messages"][0]["content"] == [
        {"type": "video_url", "video_url": {"url": clip.as_uri()}},
        {"type": "text", "text": "When is the blue flash?"},
    ]


def test_without_a_question_the_notes_of_all_windows_are_written_as_markdown(
    replay: Replay, clip: Path
) -> None:
    result = describe(replay, clip)
    assert result.exit_code == 0, result.output
    assert "- **0:00:04 - 0:00:10** [0:00:04] green bar up; [0:00:05] blue flash" in result.stdout
    assert "- **0:00:08 - 0:00:12** *took longer than 60 s*" in result.stdout
    assert "Evidence" not in result.stdout
    assert replay.requests[0]["mm_ext"] == {"long_video": {"strategy": "map_reduce"}}


def test_options_go_into_the_request_and_the_key_into_its_header(
    replay: Replay, clip: Path
) -> None:
    options = ["--strategy", "rolling", "--window", 20, "--overlap", 1, "--fps", 2]
    more = ["--max-windows", 9, "--model", "large", "--api-key", "secret"]
    result = describe(replay, clip, "-q", "What?", *options, *more)
    assert result.exit_code == 0, result.output
    (request,) = replay.requests
    assert request["model"] == "large"
    assert replay.keys == ["Bearer secret"]
    assert request["mm_ext"]["long_video"] == {
        "strategy": "rolling",
        "window_s": 20.0,
        "overlap_s": 1.0,
        "fps": 2.0,
        "max_windows": 9,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", "1"], "--window"),
        (["--fps", "0"], "--fps"),
        (["--max-windows", "0"], "--max-windows"),
        (["--strategy", "best"], "map_reduce"),
        (["--format", "pdf"], "markdown"),
        (["--output", "/nowhere/at/all.md"], "/nowhere/at"),
        (["--url", "http://127.0.0.1:80o0"], "is no address"),
        (["--url", "myserver"], "is no address"),
        (["--url", "ws://127.0.0.1:8000"], "is no address"),
        (["--page", "/nowhere/at/all.html"], "/nowhere/at"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_sent(
    replay: Replay, clip: Path, arguments: list[str], words: str
) -> None:
    result = describe(replay, clip, *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert replay.keys == []


def test_what_is_neither_file_nor_url_is_an_error(replay: Replay) -> None:
    result = describe(replay, "missing.mp4")
    assert result.exit_code == 1
    assert "missing.mp4: neither a file nor a URL" in result.stderr


def test_a_url_is_sent_as_it_is(replay: Replay) -> None:
    for url in ("https://example.com/a%20b.mp4?x=1", "file:///only/there.mp4"):
        assert describe(replay, url, "-q", "What?").exit_code == 0
        assert replay.sent_url() == url
    assert Source.of("https://example.com/a%20b.mp4?x=1").name == "a b.mp4"


def test_of_a_link_the_server_gets_the_path_of_the_file_and_the_user_sees_the_given_name(
    clip: Path, tmp_path: Path
) -> None:
    stored = tmp_path / "a" / "0123abc"
    stored.parent.mkdir()
    stored.write_bytes(clip.read_bytes())
    link = tmp_path / "clip.mp4"
    link.symlink_to(stored)
    source = Source.of(str(link))
    assert (source.name, source.url, source.path) == ("clip.mp4", stored.as_uri(), stored)
    assert source.as_data().startswith("data:video/mp4;")
    assert Source.of(link.as_uri()).path == stored


def test_a_file_that_the_server_may_not_read_is_sent_within_the_request(
    replay: Replay, clip: Path
) -> None:
    replay.refuses_files = True
    assert describe(replay, clip, "-q", "What?").exit_code == 0
    assert len(replay.requests) == 2
    assert replay.sent_url().startswith("data:video/mp4;base64,")


def test_a_file_too_large_to_be_sent_is_refused_with_what_would_help(
    replay: Replay, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay.refuses_files = True
    monkeypatch.setattr(describe_request, "MAX_SENT_BYTES", 1 << 10)
    result = describe(replay, clip, "-q", "What?")
    assert result.exit_code == 1
    assert f"--allowed-local-media-path {clip.parent}" in " ".join(result.stderr.split())
    assert len(replay.requests) == 1


def test_an_error_within_the_stream_is_shown_in_the_servers_words(
    replay: Replay, clip: Path
) -> None:
    replay.error_in_stream = True
    result = describe(replay, clip, "-q", "What?")
    assert result.exit_code == 1
    assert "500: all 3 windows failed" in result.stderr
    assert result.stdout == ""


def test_no_server_is_one_line_of_error(clip: Path) -> None:
    arguments = ["describe", str(clip), "-q", "What?", "--url", "http://127.0.0.1:9/v1"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "no answer from http://127.0.0.1:9/v1" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("named", [[], ["--model", "m"]])
def test_an_answer_of_another_kind_of_server_is_one_line_of_error(
    replay: Replay, clip: Path, named: list[str]
) -> None:
    replay.is_a_web_page = True
    result = describe(replay, clip, "-q", "What?", *named)
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("is it a vLLM server?")
    assert isinstance(result.exception, SystemExit)


def test_what_cannot_be_written_in_the_end_is_printed_with_one_line_of_error(
    replay: Replay, clip: Path, tmp_path: Path
) -> None:
    """The file system is full, say; the video may have taken an hour."""
    page = tmp_path / "page.html"
    for arguments in (["-q", "What?"], [], ["--page", page]):
        result = describe(replay, clip, *arguments, "-o", "/dev/full", "--format", "markdown")
        assert result.exit_code == 1
        assert "cannot write /dev/full: No space left on device" in result.stderr.splitlines()
        assert "At 0:00:05." in result.stdout
        assert "green bar up" in result.stdout
    assert "green bar up" in page.read_text()


def test_ctrl_c_closes_the_connection(replay: Replay, clip: Path) -> None:
    replay.never_ends = True
    command = "from vllm_mm_ext.tools.cli.main import app; app()"
    arguments = ["describe", str(clip), "-q", "What?", "--url", replay.url]
    with subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background ignores Ctrl-C, and so would the process.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            # Before its first answer, pydantic would make an error of its own of the interrupt.
            assert process.stdout.read(2) == "At"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.strip().endswith("cancelled")
    assert replay.lost.wait(60)


def test_a_server_without_the_plugin_is_told_apart(replay: Replay, clip: Path) -> None:
    replay.block = None
    result = describe(replay, clip, "-q", "What?")
    assert result.exit_code == 0
    assert "did not report any windows: it may run without the plugin" in result.stderr


def test_an_answer_in_one_pass_is_told_and_makes_a_page_without_a_timeline(
    replay: Replay, clip: Path, tmp_path: Path
) -> None:
    replay.block = {"long_video": {"strategy": "single"}}
    out = tmp_path / "out.html"
    result = describe(replay, clip, "-q", "What?", "--page", out)
    assert result.exit_code == 0
    assert "did not report any windows: it answered in one pass" in result.stderr
    assert "Timeline" not in out.read_text()


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    replay: Replay, clip: Path
) -> None:
    replay.answer = "red\x1b[2J\x07 circle\n"
    assert describe(replay, clip, "-q", "What?").stdout == "red[2J circle\n\n"


def test_json_has_everything_in_seconds(replay: Replay, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.json"
    result = describe(replay, clip, "-q", "When is the blue flash?", "-o", out)
    assert result.stdout == "At 0:00:05.\n"
    written = json.loads(out.read_text())
    assert written["answer"] == "At 0:00:05."
    assert written["cited"] == [5.0]
    assert [window["start"] for window in written["windows"]] == [0.0, 4.0, 8.0]
    assert [window["evidence"] for window in written["windows"]] == [False, True, False]


def test_the_page_is_self_contained_and_shows_pictures_notes_and_evidence(
    replay: Replay, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.html"
    result = describe(replay, clip, "-q", "When is the <blue> flash?", "--page", out)
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "<b> &" not in text
    assert "<blue>" not in text
    pictures = [link for link in page.links if link.startswith("data:image/jpeg;base64,")]
    # Each window, that of the evidence twice, and the strip.
    assert len(pictures) == 3 + 1 + 3
    assert len(set(pictures)) == 3
    assert all(link in pictures or link.removeprefix("#") in page.ids for link in page.links)
    assert page.ids == ["w0", "w1", "w2"]
    assert '<a href="#w1">0:00:05</a>' in text
    assert text.count('class="window evidence') == 2
    assert "took longer than 60 s" in text


def test_a_window_whose_picture_does_not_decode_is_shown_without_one(
    replay: Replay, tmp_path: Path
) -> None:
    whole, broken, out = (tmp_path / name for name in ("whole.mp4", "broken.mp4", "out.html"))
    make_clip(whole, width=64, height=48, duration=12, scene="shapes", fps=10, codec="mjpeg")
    # In the middle of the second window.
    damage(whole, broken, {70})
    result = describe(replay, broken, "-q", "What?", "--page", out)
    assert result.exit_code == 0, result.output
    page = Page(out.read_text())
    assert page.ids == ["w0", "w1", "w2"]
    assert len({link for link in page.links if link.startswith("data:image/jpeg")}) == 2


def test_a_page_without_pictures_is_written_where_the_video_is_not_to_be_had(
    replay: Replay, tmp_path: Path
) -> None:
    out = tmp_path / "out.html"
    result = describe(replay, "http://127.0.0.1:9/v.mp4", "-q", "What?", "--page", out)
    assert result.exit_code == 0
    assert "no pictures of v.mp4" in result.stderr
    assert not [tag for tag in Page(out.read_text()).tags if tag == "img"]
