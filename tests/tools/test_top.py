"""``vllm-mm top`` against a server that tells what real ones tell."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_mm_ext.tools.cli import top as top_command
from vllm_mm_ext.tools.cli.main import app

runner = CliRunner(env={"COLUMNS": "160"})

_CACHE = {"num_bytes": 5 << 20, "max_bytes": 1 << 30}
TOLD: dict[str, Any] = {
    "time": 1e9,
    "model": "omni",
    "tier": 1,
    "servers": [
        {
            "server": 0,
            "stats": {
                "decode": {"busy": 2, "waiting": 1},
                "decoded_cache": _CACHE,
                "media_budget": {"used_bytes": 0, "max_bytes": 1 << 31},
            },
            "live": {"sessions": 1},
            "sessions": [{"id": "sess_1", "seconds": 12.0, "files": 3}],
            "running": [],
        }
    ],
    "engines": [
        {
            "number": 4,
            "load": {"running": 3.0, "waiting": 1.0, "itl_s": 0.02, "backlog_s": None},
            "kv": {
                "blocks": 100,
                "block_bytes": 1 << 16,
                "used": 10,
                "kept": 30,
                "tokens": {"video": 300, "text": 20},
                "all_items": 1,
                "items": [
                    {
                        "hash": "h1",
                        "modality": "video",
                        "bytes": 3 << 20,
                        "digest": "ab" * 32,
                        "url": "http://host/\x1b[31mclip.mp4",
                    },
                    # A client may choose the hash.
                    {"hash": "[/red]h2", "modality": "audio", "bytes": 1 << 20},
                ],
                "sessions": [{"id": "s", "pinned": True, "items": 1, "idle_s": 1.0}],
            },
            "encoder": None,
        },
        {"number": 5, "load": None, "kv": None, "encoder": None},
        {
            "number": 6,
            "load": None,
            "kv": {
                "blocks": 100,
                "block_bytes": 1 << 16,
                "used": 0,
                "kept": 0,
                "tokens": {},
                "all_items": 0,
                "items": [],
                # A pin holds on every engine.
                "sessions": [{"id": "s", "pinned": True, "items": 0, "idle_s": None}],
            },
            "encoder": None,
        },
    ],
    "requests": [
        {
            "began": 1e9,
            "seconds": 1.25,
            "status": 200,
            "refused": "",
            "tokens": {"video": 300, "text": 20},
            "media": [{"modality": "video", "name": "http://host/clip.mp4"}],
            "more_media": 2,
            "lowered": True,
            "stages": {"fetch": [0.0, 0.1], "encode": [0.5, 1.0]},
        }
    ],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Authorization"] == "Bearer secret"
            body = json.dumps(TOLD if known else {"error": "Unauthorized"}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server, _running(server) as address:
        yield address


@contextmanager
def _running(server: socketserver.TCPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()


def top(*args: str) -> tuple[int, str]:
    result = runner.invoke(app, ["top", *args])
    return result.exit_code, result.output


def test_what_a_server_tells_is_shown(url: str) -> None:
    status, shown = top(f"{url}/v1", "--api-key", "secret", "--once")
    assert status == 0, shown
    for part in (
        "load tier 1",
        "3 running, 1 waiting, 20 ms a token",
        "40%",
        "engine 4",
        "engine 5",
        "live sess_1  12 s, 3 files",
        "1 sessions in KV, 1 pinned",
        "clip.mp4 and 2 more",
        "[/red]h2",
        "encode 500 ms, fetch 100 ms",
        "200 lowered",
    ):
        assert part in shown
    # A client chose the URL.
    assert "\x1b[31mclip" not in shown


def test_a_server_that_fails_later_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter(["first", "fails", "fails", "again"])

    def ask(*_: str) -> dict[str, Any]:
        match next(told, None):
            case None:
                raise KeyboardInterrupt
            case "fails":
                raise top_command.ServerRefusedError("it restarts")
            case name:
                return TOLD | {"model": name}

    monkeypatch.setattr(top_command, "ask", ask)
    status, shown = top("--every", "0.2")
    assert status == 0
    assert next(told, None) is None
    assert "again" in shown


def test_why_a_server_tells_nothing_newer_is_shown_beside_what_it_told() -> None:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(top_command.shown(TOLD, "it \x1b[31mrestarts"))
    title = captured.get().splitlines()[0]
    assert title.startswith("omni")
    assert "restarts" in title
    assert "\x1b[31m" not in title


def test_json_is_what_the_server_tells(url: str) -> None:
    status, shown = top(url, "--api-key", "secret", "--json")
    assert status == 0
    assert json.loads(shown) == TOLD


def test_a_server_that_does_not_tell_is_named(url: str) -> None:
    status, shown = top(url, "--once")
    assert status == 1
    assert "API key" in shown
    status, shown = top("http://127.0.0.1:1", "--once")
    assert status == 1
    assert "does not answer" in shown


@pytest.mark.parametrize("address", ["myserver", "http://127.0.0.1:80o0", "http://[::1", ""])
def test_an_address_that_is_none_is_one_line_of_error(address: str) -> None:
    status, shown = top(address, "--once")
    assert status == 1
    assert shown.count("\n") == 1
    assert f"{address}/mm_ext/sight does not answer" in shown


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.9\r\n", "does not answer"),
        (b"", "does not answer"),
        (b"HTTP/1.0 200 OK\r\n\r\n<html></html>", "is not the page of a server"),
        (b"HTTP/1.0 200 OK\r\n\r\n[]", "is not the page of a server"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"model": "m"}', "is not the page of a server"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n{}", "does not answer"),
        (b"HTTP/1.0 500 No\r\n\r\n[]", "HTTP 500"),
    ],
)
def test_whoever_answers_otherwise_is_named_in_one_line(answer: bytes, words: str) -> None:
    class Other(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Other) as server, _running(server) as address:
        status, shown = top(address, "--json")
    assert status == 1
    assert words in shown
    assert shown.count("\n") == 1
