"""What the parts of ``bench fleet`` share: replicas of one server, and a router before them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mm_ext.testing.engine_arguments import EVERY_PART, as_flags
from vllm_mm_ext.testing.routers import missing
from vllm_mm_ext.testing.server import MODEL_NAME, Server, serve, together
from vllm_mm_ext.tools.bench.bench_clips import other_pictures
from vllm_mm_ext.tools.bench.chat import ask, conversation
from vllm_mm_ext.tools.bench.conversations import checkpoint
from vllm_mm_ext.tools.bench.conversations_engine import BLOCK, CONFIG, CONTEXT, FPS, MAX_FRAMES
from vllm_mm_ext.tools.bench.harness import BenchContext

if TYPE_CHECKING:
    from vllm_mm_ext.tools.bench.fleet_routing import RoutingRun

REPLICAS = ("replica-1", "replica-2")
SLOTS = 16
"""Requests that a replica serves at once (`--max-num-seqs`)."""
STEP_TOKENS = 2048
"""`--max-num-batched-tokens` of a replica."""


@dataclass
class FleetStudy:
    """What the parts run with.

    Attributes:
        context: Progress and directories.
        servers: Ends the servers that parts share.
        notes: Sentences for the reader, added to by the parts.
    """

    context: BenchContext
    servers: contextlib.ExitStack
    notes: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> Path:
        """The checkpoint of every replica."""
        return checkpoint(self.context)

    @cached_property
    def routing(self) -> dict[str, list[RoutingRun]]:
        """The conversations by each routing, once a repeat, played when first asked for."""
        from vllm_mm_ext.tools.bench.fleet_routing import played

        return played(self)

    @cached_property
    def has_envoy(self) -> bool:
        """Whether Envoy can be started; a note says so if it cannot."""
        reason = missing("envoy")
        if reason is not None:
            self.notes.append(
                f"{reason}: the client chose the replica itself, by rendezvous hashing or in turn; "
                "what needs Envoy was left out"
            )
        return reason is None

    def in_orders(self, sides: Sequence[str]) -> Iterator[str]:
        """The sides once a repeat, in every other repeat the last one first."""
        for repeat in range(self.context.repeats):
            yield from sides[:: -1 if repeat % 2 else 1]

    def videos(self, media: Path, first: int, count: int) -> list[Path]:
        """Clips of 10 s without a picture in common, below a folder that the replicas may read.

        Args:
            media: The folder.
            first: Number of the first clip.
            count: How many.
        """
        return [
            Path(shutil.copy(self._clip(number), media / f"{number}.mp4"))
            for number in range(first, first + count)
        ]

    def _clip(self, number: int) -> Path:
        size = {"width": 448, "height": 224, "duration": 10.0}
        return other_pictures(self.context.work_dir, 50 + number, **size)

    @contextlib.contextmanager
    def replicas(
        self, media: Path, kv_blocks: int, names: Sequence[str] = REPLICAS
    ) -> Iterator[list[Server]]:
        """Servers that are alike, on cores of their own, started at the same time and warm.

        Each names itself as the model of its answers.

        Args:
            media: Folder with videos that they may read.
            kv_blocks: Size of the KV cache of each.
            names: Of ``REPLICAS``: which of them are started.
        """
        starts = [
            serve(
                self.model,
                plugin=True,
                args=[
                    *("--allowed-local-media-path", str(media)),
                    *("--served-model-name", name, MODEL_NAME),
                    *("--max-model-len", str(CONTEXT), "--block-size", str(BLOCK)),
                    *("--num-gpu-blocks-override", str(kv_blocks)),
                    *("--max-num-seqs", str(SLOTS), "--max-num-batched-tokens", str(STEP_TOKENS)),
                    *("--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
                    *(
                        "--media-io-kwargs",
                        f'{{"video": {{"fps": {FPS}, "max_frames": {MAX_FRAMES}}}}}',
                    ),
                    *("--dtype", "float32", "--enable-prompt-tokens-details"),
                    *as_flags(EVERY_PART),
                ],
                env=thread_bounds(),
                additional_config=CONFIG,
                cores=cores,
            )
            for name, cores in zip(names, shares_of_cores(), strict=False)
        ]
        with together(starts) as servers:
            # The first video of a server pays for lazy imports and worker starts.
            for server, warm in zip(
                servers, self.videos(media, -len(servers), len(servers)), strict=True
            ):
                ask(server, conversation(warm.as_uri(), 1))
            yield servers


def shares_of_cores() -> list[list[int]]:
    """Cores of each replica: its own, as in a fleet, where there are enough; else all of them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(REPLICAS):
        return [cores for _ in REPLICAS]
    each = len(cores) // len(REPLICAS)
    return [cores[place * each :][:each] for place in range(len(REPLICAS))]


def thread_bounds() -> dict[str, str]:
    """Environment of a server with a replica's share of the cores."""
    # By itself, vLLM would choose cores for its threads.
    threads = str(len(shares_of_cores()[0]))
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}


def encoder_tokens(servers: Sequence[Server]) -> dict[str, float]:
    """Tokens of videos that went through the encoder of each replica since it started.

    Args:
        servers: The first ones of ``REPLICAS``.
    """
    return {
        name: server.metric("mm_ext_encoder_tokens_total")
        for name, server in zip(REPLICAS, servers, strict=False)
    }
