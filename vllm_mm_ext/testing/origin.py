"""A real HTTP origin on loopback whose behaviour tests and benchmarks choose per path."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

_CHUNK = 64 << 10


@dataclass(frozen=True)
class Resource:
    """How the origin answers one path.

    Attributes:
        body: Bytes of a 200 answer.
        status: Status to answer with; ``body`` is sent with any status but 304 and redirects.
        headers: Extra response headers, e.g. ``Cache-Control``.
        etag: Entity tag with its quotes; answers 304 to a matching ``If-None-Match``.
        last_modified: HTTP date; answers 304 to an equal ``If-Modified-Since``.
        location: Redirect target; ``status`` should then be a redirect's.
        fail_first: Number of requests answered 503 before the first real answer.
        content_length: Overrides the true ``Content-Length``; the connection closes after
            ``body``, so a larger value makes a truncated body.
        chunked: Send chunked transfer coding, without ``Content-Length``.
        delay_s: Seconds before the answer.
        bytes_per_s: Pace of the body, 0 for unlimited.
        hold: If given, the body's second half waits until this event is set.
    """

    body: bytes = field(default=b"", repr=False)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    etag: str | None = None
    last_modified: str | None = None
    location: str | None = None
    fail_first: int = 0
    content_length: int | None = None
    chunked: bool = False
    delay_s: float = 0.0
    bytes_per_s: int = 0
    hold: threading.Event | None = None


class Origin:
    """A threaded HTTP/1.1 server on 127.0.0.1, for use as a context manager.

    Attributes:
        requests: Requests received, by path (with its query).
        body_bytes: Body bytes sent, by path.
        statuses: Answers sent, by ``(path, status)``.
        last_headers: Headers of the last request, by path, lower-case names.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.body_bytes: Counter[str] = Counter()
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.last_headers: dict[str, dict[str, str]] = {}
        self._resources: dict[str, Resource] = {}
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.origin = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def serve(self, path: str, resource: Resource) -> str:
        """Answer ``path`` (starting with ``/``) with ``resource`` from now on; returns the URL."""
        with self._lock:
            self._resources[path] = resource
            self._failures[path] = 0
        return self.url(path)

    def serve_file(self, file: Path, *, cache_control: str | None = None) -> str:
        """Serve a file under its name with an ETag of its content; returns the URL."""
        body = file.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {"Cache-Control": cache_control} if cache_control is not None else {}
        return self.serve(f"/{file.name}", Resource(body, etag=etag, headers=headers))

    def forget(self, url: str) -> None:
        """Answer ``url`` 404 from now on, and drop what is known of it."""
        path = "/" + url.split("/", 3)[3]
        with self._lock:
            self._resources.pop(path, None)
            for counts in (self.requests, self.body_bytes, self._failures, self.last_headers):
                counts.pop(path, None)
            for key in [key for key in self.statuses if key[0] == path]:
                del self.statuses[key]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """URL of ``path``. ``host`` may be another name of loopback, such as ``localhost``."""
        return f"http://{host}:{self._server.server_address[1]}{path}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def resource_for(self, path: str, headers: Mapping[str, str]) -> Resource:
        """Count a request and decide its answer."""
        with self._lock:
            self.requests[path] += 1
            self.last_headers[path] = {name.lower(): value for name, value in headers.items()}
            resource = self._resources.get(path, Resource(status=404))
            if self._failures[path] < resource.fail_first:
                self._failures[path] += 1
                resource = Resource(status=503)
            elif _matches(resource, self.last_headers[path]):
                resource = Resource(
                    status=304,
                    etag=resource.etag,
                    last_modified=resource.last_modified,
                    headers=resource.headers,
                )
            self.statuses[path, resource.status] += 1
            return resource

    def count_body(self, path: str, num_bytes: int) -> None:
        """Record body bytes handed to the socket."""
        with self._lock:
            self.body_bytes[path] += num_bytes


def _matches(resource: Resource, headers: Mapping[str, str]) -> bool:
    if resource.status != 200:
        return False
    if (tags := headers.get("if-none-match")) is not None:
        return resource.etag is not None and resource.etag in [t.strip() for t in tags.split(",")]
    since = headers.get("if-modified-since")
    return since is not None and since == resource.last_modified


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Handlers may wait on an event; closing must not wait for them.
    block_on_close = False
    request_queue_size = 128
    origin: Origin

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests, not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        resource = self.server.origin.resource_for(self.path, dict(self.headers.items()))
        if resource.delay_s:
            time.sleep(resource.delay_s)
        self.send_response(resource.status)
        for name, value in resource.headers.items():
            self.send_header(name, value)
        if resource.etag is not None:
            self.send_header("ETag", resource.etag)
        if resource.last_modified is not None:
            self.send_header("Last-Modified", resource.last_modified)
        if resource.location is not None:
            self.send_header("Location", resource.location)
        if resource.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif resource.status != 304:
            length = resource.content_length
            self.send_header(
                "Content-Length", str(len(resource.body) if length is None else length)
            )
            if length is not None and length != len(resource.body):
                self.close_connection = True
        self.end_headers()
        self._send_body(resource)

    def _send_body(self, resource: Resource) -> None:
        sent = 0
        half = len(resource.body) // 2
        while sent < len(resource.body):
            if resource.hold is not None and sent >= half:
                resource.hold.wait()
            end = min(sent + _CHUNK, len(resource.body))
            if resource.hold is not None and sent < half:
                end = min(end, half)
            chunk = resource.body[sent:end]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if resource.chunked else chunk)
            self.wfile.flush()
            self.server.origin.count_body(self.path, len(chunk))
            sent = end
            if resource.bytes_per_s:
                time.sleep(len(chunk) / resource.bytes_per_s)
        if resource.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
