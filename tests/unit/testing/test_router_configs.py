"""The routers' configurations of this repository, put before other servers for tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_mm_ext.testing.routers import CONFIGS, ROUTERS, envoy_config

REPLICAS = [f"http://127.0.0.1:{port}" for port in (7001, 7002, 7003)]


def test_envoy_gets_other_servers_and_keeps_what_a_long_video_needs() -> None:
    config = yaml.safe_load(envoy_config(REPLICAS, 7000))["static_resources"]
    (listener,), (cluster,) = config["listeners"], config["clusters"]
    assert listener["address"]["socket_address"]["port_value"] == 7000
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    ports = [
        one["endpoint"]["address"]["socket_address"]["port_value"]
        for one in endpoints["lb_endpoints"]
    ]
    assert ports == [7001, 7002, 7003]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["stream_idle_timeout"] == "0s"
    route = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    assert route["timeout"] == "0s"
    assert route["retry_policy"]["retry_on"] == "connect-failure"
    assert cluster["lb_policy"] == "MAGLEV"
    changed = yaml.safe_load(envoy_config(REPLICAS, 7000, {"lb_policy": "ROUND_ROBIN"}))
    assert changed["static_resources"]["clusters"][0]["lb_policy"] == "ROUND_ROBIN"


def test_nginx_asks_another_server_where_a_connection_takes_too_long() -> None:
    text = (CONFIGS / "nginx.conf").read_text()
    (words,) = re.findall(r"proxy_next_upstream (.*);", text)
    # With `non_idempotent` it would send again what a server has got.
    assert words.split() == ["error", "timeout"]


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_other_routers_get_other_servers_and_keep_the_rest(name: str, tmp_path: Path) -> None:
    start: Callable[..., Any] = ROUTERS[name]
    start(name, tmp_path, 7000, REPLICAS)
    (made,) = tmp_path.iterdir()
    text = made.read_text()
    shipped = (CONFIGS / made.name).read_text()
    assert [text.count(f"127.0.0.1:{port}") for port in (7000, 7001, 7002, 7003)] == [1, 1, 1, 1]
    assert "8001" in shipped
    assert not {"8000", "8001", "8002"} & set(text.replace(";", " ").replace(":", " ").split())
    assert len(text.splitlines()) == len(shipped.splitlines()) + 1
