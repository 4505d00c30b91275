"""Servers of ``bench live``, what they compute, and the same conversation as chat completions."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import SCHEDULER, as_flags
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.harness import BenchContext
from vllm_mm_ext.tools.bench.live_feed import Feed
from vllm_mm_ext.tools.bench.long_video_files import Films, composer_server

# The server's log then says what each step computed.
LOGGED = "--enable-logging-iteration-details"
# Sound and pictures of the tiny model; as many sessions as a part may hold.
_ARGS = (
    *("--max-model-len", "16384", "--max-num-seqs", "64", "--max-num-batched-tokens", "8192"),
    *("--limit-mm-per-prompt", '{"video": 8, "audio": 64, "image": 8}'),
    # By default vLLM's blocks have 16 tokens on a GPU and 128 on a CPU, where 32 are the fewest. A
    # unit of the tiny Omni has 114 tokens.
    *("--block-size", "32"),
    "--enable-prompt-tokens-details",
)
# All pictures of a feed, of which stock takes the first 32 by default.
_STOCK_ARGS = ("--media-io-kwargs", '{"video": {"num_frames": -1}}')
COMPOSER_FPS = 4.0
"""Frames per second of the composer, as it was trained."""


@dataclass
class Study:
    """What the parts run with.

    Attributes:
        context: Progress and directories.
        servers: Ends the servers that the parts share.
        notes: Sentences for the reader, added to by the parts.
    """

    context: BenchContext
    servers: ExitStack
    notes: list[str] = field(default_factory=list)

    @cached_property
    def omni(self) -> Server:
        """The tiny Qwen2.5-Omni with the plugin, started when first asked for."""
        return self.servers.enter_context(omni_server())

    @cached_property
    def composer(self) -> Server:
        """The composer, the same."""
        return self.servers.enter_context(live_composer(self.context))


@contextmanager
def omni_server(
    *, plugin: bool = True, settings: Mapping[str, Any] | None = None, logged: bool = True
) -> Iterator[Server]:
    """A server of a tiny Qwen2.5-Omni, with the plugin or stock vLLM.

    Args:
        plugin: Whether with the plugin.
        settings: Of ``mm_ext``.
        logged: Whether the server's log says what each step computed, which each step pays for.
    """
    with serve(
        checkpoint("qwen2_5_omni"),
        plugin=plugin,
        args=[
            *_ARGS,
            *([LOGGED] if logged else []),
            *(as_flags(SCHEDULER) if plugin else _STOCK_ARGS),
        ],
        env={
            # On the engine's core, others would stop all of its threads.
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1)),
            # One process for engine and worker, as vLLM has it with one GPU. With two, each waits
            # for the other in a loop that takes a core.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        additional_config=None if settings is None else {"mm_ext": settings},
    ) as server:
        yield server


@contextmanager
def live_composer(context: BenchContext, live: Mapping[str, Any] | None = None) -> Iterator[Server]:
    """A server of the composer that ships with the package, sessions at its frame rate.

    Args:
        context: Its directory is where the server may read files.
        live: More of ``mm_ext.live``.
    """
    settings = {"live": {"fps": COMPOSER_FPS, **(live or {})}}
    with composer_server(Films(context.work_dir), settings) as server:
        yield server


def as_messages(feed: Feed) -> list[dict[str, Any]]:
    """A feed as one user message of a chat completion: pictures as a video, and the sound."""
    images = ",".join(base64.b64encode(image).decode() for _, image in feed.pictures)
    sound = base64.b64encode(feed.wav()).decode()
    parts: list[dict[str, Any]] = []
    if images:
        url = f"data:video/jpeg;base64,{images}"
        parts.append({"type": "video_url", "video_url": {"url": url}})
    parts.append({"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}})
    return [{"role": "user", "content": parts}]


def file_messages(path: Path, question: str) -> list[dict[str, Any]]:
    """A question about a file that the server may read."""
    url = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    video = {"type": "video_url", "video_url": {"url": url}}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}]
