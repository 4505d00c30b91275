"""``bench fleet``: what needs no servers."""

import http.client
import os
import sys
from pathlib import Path

import pytest

from vllm_mm_ext.testing.checkpoints.qwen_vl import vision_2_5
from vllm_mm_ext.testing.checkpoints.sizes import Sizes
from vllm_mm_ext.testing.server import free_port, running
from vllm_mm_ext.tools.bench.commands import FleetPart
from vllm_mm_ext.tools.bench.fleet_balance import Served, in_flight
from vllm_mm_ext.tools.bench.fleet_bench import PARTS
from vllm_mm_ext.tools.bench.fleet_encode import MODEL_SIZE
from vllm_mm_ext.tools.bench.fleet_routing import answered, request_body
from vllm_mm_ext.tools.bench.fleet_study import REPLICAS, shares_of_cores


def served(sent_s: float, end_s: float, replica: int) -> Served:
    return Served(sent_s, end_s, f"replica-{replica}", 10, 5)


def test_every_part_can_be_asked_for() -> None:
    assert [part.value for part in FleetPart] == list(PARTS)


def test_the_busiest_replica_is_told_on_the_average_and_at_its_highest() -> None:
    even = [served(0, 1, 1), served(0, 1, 2), served(1, 3, 1), served(1, 3, 2), served(3, 4, 1)]
    assert in_flight(even, 2) == (1.0, 1.0)
    # From 1 s on, three and one for 2 s, then two and two for 2 s.
    uneven = [served(0, 1, 1) for _ in range(3)] + [served(0, 1, 2)]
    uneven += [served(1, 3, 1), served(1, 5, 1), served(1, 5, 1), served(1, 5, 2)]
    uneven += [served(3, 5, 2), served(5, 6, 1)]
    mean, most = in_flight(uneven, 4)
    assert mean == pytest.approx(10 / 8)  # Replica 1 has 3 and then 2 in flight, of 4.
    assert most == 1.5


def test_the_first_and_the_last_requests_do_not_count() -> None:
    alone = [served(0, 1, 1), served(0, 1, 1)]
    even = [served(1, 2, 1), served(1, 2, 2), served(2, 3, 1), served(2, 9, 1)]
    assert in_flight(alone + even, 2) == (1.0, 1.0)


def test_the_encoder_that_is_run_apart_costs_what_those_of_real_models_do() -> None:
    sizes = Sizes(**MODEL_SIZE)
    tower = vision_2_5(sizes)
    of_tower, of_text = tower["hidden_size"], sizes.hidden_size
    # Multiplications for a token: projections of attention, then the gated MLP. A token is a square
    # of merged patches.
    patches = tower["spatial_merge_size"] ** 2
    mlp = 3 * of_tower * tower["intermediate_size"]
    encoder = patches * tower["depth"] * (4 * of_tower**2 + mlp)
    keys = sizes.kv_heads * sizes.head_dim
    text = sizes.layers * (2 * of_text**2 + 2 * of_text * keys + 3 * of_text * 2 * of_text)
    # Qwen2.5-VL-7B: 0.4, 3B: 0.9.
    assert 0.4 <= encoder / text <= 1
    assert encoder / text == pytest.approx(0.85, abs=0.01)


def test_each_replica_has_cores_of_its_own_where_there_are_enough() -> None:
    shares = shares_of_cores()
    cores = os.sched_getaffinity(0)
    if len(cores) < len(REPLICAS):
        assert shares == [sorted(cores)] * len(REPLICAS)
    else:
        assert sum(map(len, shares)) == len({core for share in shares for core in share})
        assert {core for share in shares for core in share} <= cores


_SERVER = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer([json.dumps(sorted(os.sched_getaffinity(0)))])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        about = {"model": "replica-2", "choices": [{"delta": {"content": body["model"]}}]}
        usage = {"prompt_tokens": 30, "prompt_tokens_details": {"cached_tokens": 16}}
        last = {"model": "replica-2", "choices": [], "usage": usage}
        last["mm_ext"] = {"tokens": {"visual": 20}}
        chunks = [json.dumps(about), json.dumps(last), "[DONE]"]
        self.answer([f"data: {chunk}\\n\\n" for chunk in chunks])

    def answer(self, parts):
        text = "".join(parts).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_request_is_recorded_as_its_answer_tells_by_a_server_on_the_cores_given(
    tmp_path: Path,
) -> None:
    port = free_port()
    command = [sys.executable, "-c", _SERVER, str(port)]
    core = max(os.sched_getaffinity(0))
    with running(command, os.environ, port, tmp_path / "log", cores=[core]) as server:
        assert server.get("/") == f"[{core}]"
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = request_body(tmp_path / "1.mp4", 2)
        for _ in range(2):
            found = answered(connection, body, 1, 2, began=0.0)
        connection.close()
    assert (found.conversation, found.turn, found.replica) == (1, 2, "replica-2")
    assert (found.prompt_tokens, found.cached_tokens, found.media_tokens) == (30, 16, 20)
    assert found.sent_s < found.first_token_s <= found.end_s
