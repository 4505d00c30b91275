"""Questions between the API servers of a service, which share one port and so cannot be chosen.

Each API server listens on a socket of its own, known by the service's name and the server's index.
The sockets are in Linux's abstract namespace: they have no file, and are gone with their process.
Only processes of the same user are answered, and asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

_LENGTH = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("iII")
# A message is a few lists and figures, or the record of one request with its thumbnails.
_MOST_BYTES = 64 << 20

Answer = Callable[[Mapping[str, Any]], Awaitable[Any]]


class PeerError(Exception):
    """An API server did not answer; the message says which, and why."""


class Peers:
    """The API servers of one service, from the view of one of them.

    Args:
        service: Name of the service, alike in all its processes.
        index: Of this API server, from 0.
        count: Number of API servers.
        answer: Answers a question, which is a JSON object, with a JSON value. Also called for what
            this server asks itself.
    """

    def __init__(self, service: str, index: int, count: int, answer: Answer) -> None:
        self.index = index
        self.count = count
        self._service = service
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, if there are other API servers.

        Raises:
            OSError: The name is taken.
        """
        if self.count > 1:
            sock = _socket()
            sock.bind(self._path(self.index))
            self._server = await asyncio.start_unix_server(self._serve, sock=sock)

    async def ask_all(self, question: Mapping[str, Any], timeout_s: float) -> list[Any]:
        """What every API server answers, in their order, this one included.

        Args:
            question: What is asked.
            timeout_s: Seconds to wait for an answer.

        Raises:
            PeerError: One of them did not answer.
        """
        asked = (self._ask(index, question, timeout_s) for index in range(self.count))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def _ask(self, index: int, question: Mapping[str, Any], timeout_s: float) -> Any:
        if index == self.index:
            return await self._answer(question)
        try:
            async with asyncio.timeout(timeout_s):
                sock = _socket()
                try:
                    await asyncio.get_running_loop().sock_connect(sock, self._path(index))
                    if not _is_ours(sock):
                        raise PermissionError("a process of another user has taken its name")
                    reader, writer = await asyncio.open_unix_connection(sock=sock)
                except BaseException:
                    sock.close()
                    raise
                try:
                    _write(writer, question)
                    answer = await _read(reader)
                finally:
                    writer.close()
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise PeerError(f"API server {index} does not answer ({why})") from None
        if "failed" in answer:
            raise PeerError(f"API server {index} failed: {answer['failed']}")
        return answer["answer"]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not _is_ours(writer.get_extra_info("socket")):
                return
            question = await _read(reader)
            try:
                answer = {"answer": await self._answer(question)}
            except Exception as error:
                answer = {"failed": f"{type(error).__name__}: {error}"}
            _write(writer, answer)
            await writer.drain()
        except (OSError, EOFError, ValueError):
            return  # Who asked is gone, or asked nothing that can be read.
        finally:
            writer.close()

    def _path(self, index: int) -> str:
        return f"\0mm_ext-{os.getuid()}-{self._service}-{index}"


def _socket() -> socket.socket:
    """A socket for names without a file, which uvloop (vLLM's event loop) does not connect by."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def _is_ours(sock: Any) -> bool:
    """Whether a process of this user is at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return bool(uid == os.getuid())


def _write(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    body = json.dumps(message).encode()
    writer.write(_LENGTH.pack(len(body)) + body)


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > _MOST_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(await reader.readexactly(length))
