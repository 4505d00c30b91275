"""The soak: what it asks and sees, and a short one on a real server with tiny caches."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.testing.checkpoints import cache_root
from vllm_mm_ext.testing.memory import Role
from vllm_mm_ext.testing.origin import Origin
from vllm_mm_ext.testing.usage import Usage, mapped_media, usage
from vllm_mm_ext.tools.bench.soak import TINY, server_for, small_model
from vllm_mm_ext.tools.bench.soak_clients import Course, Sample, Soak
from vllm_mm_ext.tools.bench.soak_media import SoakMedia
from vllm_mm_ext.tools.bench.soak_work import conversation

MIB = 1 << 20
CLIENTS = 4


@pytest.fixture
def media(tmp_path: Path) -> Iterator[SoakMedia]:
    with Origin() as origin:
        yield SoakMedia(cache_root() / "bench", tmp_path, origin, clips=9)


def test_conversations_are_of_every_kind_and_the_same_for_a_seed(
    media: SoakMedia, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    kinds: list[list[tuple[str, str, int]]] = []
    for _ in range(2):
        rng, asked = random.Random("a seed"), []
        for _ in range(60):
            with conversation(media, rng) as questions:
                asked += [(q.kind, q.leaves, len(q.body["messages"])) for q in questions]
        kinds.append(asked)
    assert kinds[0] == kinds[1]
    counts = Counter(kind for kind, *_ in kinds[0])
    assert len(counts) == 9
    assert {leaves for _, leaves, _ in kinds[0]} == {"never", "after a token", "before the answer"}
    # What was made for a conversation has gone with it.
    assert sorted(tmp_path.iterdir()) == before


def test_usage_counts_descriptors_threads_and_memory_files_of_descendants() -> None:
    script = (
        "import threading, time\n"
        "from vllm_mm_ext.media.fetch.blob import Blob\n"
        "held = Blob.from_bytes(bytes(32 << 20))\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    before = usage(os.getpid())
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        own = [Blob.from_bytes(b"a"), Blob.from_bytes(b"b")]
        after = usage(os.getpid())
        child.kill()
    assert after["api"].descriptors >= before["api"].descriptors + len(own)
    # By its command line the child is taken for a decode worker.
    worker, none = after["decode"], before.get("decode", Usage())
    assert (worker.processes, worker.threads) == (none.processes + 1, none.threads + 2)
    # Encoded media are not mapped, and counted all the same.
    assert worker.memory - none.memory > 32 * MIB


def test_a_moment_is_the_median_of_the_time_before_it() -> None:
    roles: list[Role] = ["api", "engine"]
    samples = [
        Sample(float(second), {role: Usage(memory=second) for role in roles})
        for second in range(101)
    ]
    course = Course(samples)
    assert course.at(0.0, lambda sample: sample.of("api").memory) == 0
    assert course.at(50.0, lambda sample: sample.of("api").memory) == 47.5
    assert course.at(100.0, lambda sample: sample.of(None).memory) == 2 * 97.5
    assert Course(samples[::100]).at(60.0, lambda sample: sample.of("api").memory) == 0


@pytest.mark.engine
@pytest.mark.slow
def test_under_mixed_work_a_server_keeps_to_its_tiny_caches(
    media: SoakMedia, tmp_path: Path
) -> None:
    model = small_model(cache_root() / "bench")
    with server_for(model, tmp_path, True, "tiny", tmp_path / "server.log") as server:
        soak = Soak(server, media, clients=CLIENTS)
        course = soak.run(15.0)
        live = mapped_media(server.pid)
    assert course.alive
    # vLLM 0.32 itself fails a request now and then whose items its processor cache dropped.
    assert not any("the client raised" in fault for fault in course.faults)
    assert course.count("answered") > 10 * course.count("failed")
    cache = TINY["media"]["cache"]["decoded_mb"] * MIB
    # A client asks about one video at a time; none has more than 32 frames of 168 x 168.
    assert live <= cache + CLIENTS * 32 * 168 * 168 * 3
