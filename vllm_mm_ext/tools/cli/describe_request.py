"""The request of ``vllm-mm describe``: how the video is sent, what comes back while it is read."""

from __future__ import annotations

import base64
import ipaddress
import mimetypes
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from vllm_mm_ext.tools.cli.description import Description, NotedWindow, times_in, with_evidence

if TYPE_CHECKING:
    import openai

DESCRIPTION_QUESTION = "Describe what happens in this video, in order, with times."
# Of a file inside a request: a third more as base64, and the server holds the request in memory.
MAX_SENT_BYTES = 128 << 20
_FLAG = "--allowed-local-media-path"


class DescribeError(Exception):
    """The video cannot be sent, or the server refused or failed; the message is for the user.

    Args:
        message: In one line.
        at_server: The server failed, so its log tells more.
    """

    def __init__(self, message: str, *, at_server: bool = False) -> None:
        super().__init__(message)
        self.at_server = at_server


@dataclass(frozen=True)
class Source:
    """A video that is asked about.

    Attributes:
        name: What to call it: a file's name as it was given.
        url: What the server gets first: a URL as it was given, or that of a local file.
        path: The local file, where there is one, without links: servers look where a file really
            lies.
        given: The user gave a URL, which is sent as it is.
    """

    name: str
    url: str
    path: Path | None
    given: bool

    @classmethod
    def of(cls, text: str) -> Source:
        """The source that a command-line argument names.

        Raises:
            DescribeError: It is neither a file nor a URL.
        """
        parts = urlsplit(text)
        if parts.scheme in ("http", "https"):
            name = unquote(Path(parts.path).name) or parts.netloc
            return cls(name, text, None, given=True)
        if parts.scheme == "file":
            path = Path(url2pathname(parts.path))
            return cls(path.name, text, path.resolve() if path.is_file() else None, given=True)
        path = Path(text)
        if not path.is_file():
            raise DescribeError(f"{text}: neither a file nor a URL (http:, https:, file:)")
        real = path.resolve()
        return cls(path.name, real.as_uri(), real, given=False)

    def as_data(self) -> str:
        """The file itself as a ``data:`` URL.

        Raises:
            DescribeError: It is too large for that.
        """
        assert self.path is not None
        if (size := self.path.stat().st_size) > MAX_SENT_BYTES:
            raise DescribeError(
                f"{self.name} has {size / (1 << 20):,.0f} MiB. The server may not read it "
                f"where it lies (`{_FLAG} {self.path.parent}` lets it), and a file sent within the "
                f"request may have {MAX_SENT_BYTES >> 20} MiB at most."
            )
        kind = mimetypes.guess_type(self.name)[0] or "video/mp4"
        return f"data:{kind};base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Progress:
    """A window was read: the ``done``-th of ``total``, its seconds, and its note if it has one."""

    done: int
    total: int
    start: float
    end: float
    note: str | None


@dataclass
class Conversation:
    """One question to a server about a video; iterate over what comes, then ask for the result.

    Attributes:
        client: Asks the server.
        model: Name of the model there.
        source: The video.
        question: What is asked; None for a description.
        options: The request's ``mm_ext.long_video`` block.
        max_tokens: Tokens of the answer at most.
    """

    client: openai.OpenAI
    model: str
    source: Source
    question: str | None
    options: Mapping[str, Any]
    max_tokens: int
    _answer: str = ""
    _report: Mapping[str, Any] = field(default_factory=dict)
    _usage: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Progress | str]:
        """Progress, window by window, then the answer, piece by piece.

        To leave the iteration early (an error, Ctrl-C) closes the connection, and the server drops
        what it still had to do.

        Raises:
            DescribeError: See the class.
        """
        source = self.source
        if source.given:
            yield from self._ask(source.url)
        elif not _is_this_machine(str(self.client.base_url)):
            yield from self._ask(source.as_data())
        else:
            try:
                yield from self._ask(source.url)
            except DescribeError as error:
                # Nothing else tells whether the server may read the file where it lies.
                if _FLAG not in str(error):
                    raise
                yield from self._ask(source.as_data())

    def _ask(self, url: str) -> Iterator[Progress | str]:
        import openai

        parts: Any = [
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "text", "text": self.question or DESCRIPTION_QUESTION},
        ]
        try:
            stream = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": parts}],
                max_tokens=self.max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"mm_ext": {"long_video": dict(self.options)}},
            )
            told = False
            with closing(stream):
                for chunk in stream:
                    told = True
                    yield from self._take(chunk)
            if not told:
                raise DescribeError(f"{self.client.base_url} sent no answer; is it a vLLM server?")
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise DescribeError(f"no answer from {self.client.base_url}: {reason}") from error
        except openai.APIError as error:
            raise _failed(error) from error

    def _take(self, chunk: Any) -> Iterator[Progress | str]:
        block = (chunk.model_extra or {}).get("mm_ext") or {}
        if (progress := block.get("progress")) is not None:
            yield Progress(
                progress["done"],
                progress["total"],
                progress["start"],
                progress["end"],
                progress.get("note"),
            )
        elif block:
            self._report = block
        if chunk.usage is not None:
            self._usage = chunk.usage.model_dump(exclude_none=True)
        for choice in chunk.choices:
            if choice.delta.content:
                self._answer += choice.delta.content
                yield choice.delta.content

    def result(self) -> Description:
        """What the server said altogether."""
        report = self._report.get("long_video") or {}
        cited = {float(time) for time in report.get("cited", ())}
        cited |= {float(second) for _, _, second in times_in(self._answer)}
        found = Description(
            name=self.source.name,
            model=self.model,
            question=self.question,
            answer=self._answer.strip(),
            strategy=report.get("strategy"),
            windows=tuple(sorted(_windows(report), key=lambda window: window.start)),
            cited=tuple(sorted(cited)),
            cost=report.get("cost", {}),
            usage=self._usage,
        )
        return with_evidence(found) if self.question is not None else found


def _windows(report: Mapping[str, Any]) -> Iterator[NotedWindow]:
    for window in report.get("windows", ()):
        yield NotedWindow(
            number=window["window"],
            start=window["start"],
            end=window["end"],
            note=window.get("note"),
            relevance=window.get("relevance"),
            problem=window.get("failed"),
        )
    for window in report.get("left_out", ()):
        left_out = "left out: the request's budget was used up"
        yield NotedWindow(window["window"], window["start"], window["end"], problem=left_out)


def served_model(client: openai.OpenAI) -> str:
    """Name of the first model that a server lists.

    Raises:
        DescribeError: The server does not answer, or lists none.
    """
    import openai

    try:
        answer = client.models.with_raw_response.list()
    except openai.APIConnectionError as error:
        reason = error.__cause__ or error
        raise DescribeError(f"no answer from {client.base_url}: {reason}") from error
    except openai.APIError as error:
        raise _failed(error) from error
    try:
        names = [str(model["id"]) for model in answer.http_response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        # Such as the page of a proxy.
        raise DescribeError(
            f"{client.base_url}models holds no list of models; is it a vLLM server?"
        ) from None
    if not names:
        raise DescribeError(f"{client.base_url} lists no model; name one with --model")
    return names[0]


def _failed(error: openai.APIError) -> DescribeError:
    """The server's own words, with the status before them."""
    body = error.body
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        body = body["error"]
    told = body if isinstance(body, Mapping) else {}
    # An error within a stream has its status in the body alone.
    status = getattr(error, "status_code", None) or told.get("code")
    words = told.get("message") or error.message
    return DescribeError(
        f"{status}: {words}" if status else str(words),
        at_server=isinstance(status, int) and status >= 500,
    )


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
