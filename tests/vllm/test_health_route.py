"""``GET /mm_ext/health`` is 200 while engine and decode workers work, else says what does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_mm_ext.adapters.runtime import attach_runtime, detach_runtime
from vllm_mm_ext.adapters.serving.health import HealthRoute
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits


class Renderer:
    def __init__(self, mm_processor: object) -> None:
        self.mm_processor = mm_processor


class EngineClient:
    """Stands in for vLLM's ``AsyncLLM``."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.dead = False

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDeadError


@pytest.fixture
def engine() -> Iterator[EngineClient]:
    engine = EngineClient(Renderer(object()))
    attach_runtime(MMExtConfig(), ModelTraits(), engine.renderer)
    yield engine
    detach_runtime(engine.renderer)


def server(engine: Any) -> TestClient:
    app, route = FastAPI(), HealthRoute()
    route.attach_to(app)
    route.start(engine)
    return TestClient(app)


def test_a_server_that_works_is_healthy(engine: EngineClient) -> None:
    answer = server(engine).get("/mm_ext/health")
    assert answer.status_code == 200
    assert answer.json() == {"ok": True, "problems": {}}
    assert answer.headers["cache-control"] == "no-store"


def test_each_part_that_cannot_work_is_named(
    engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.dead = True
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    answer = server(engine).get("/mm_ext/health")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    found = answer.json()
    assert found["ok"] is False
    assert found["problems"].keys() == {"engine", "decode"}
    assert "nowhere" not in answer.text


def test_a_server_that_does_not_decode_is_asked_for_its_engine_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    without = SimpleNamespace(enabled=False)
    off = EngineClient(Renderer(object()))
    runtime = attach_runtime(MMExtConfig(), ModelTraits(), off.renderer)
    monkeypatch.setattr(runtime, "config", SimpleNamespace(media=without))
    for engine in (off, EngineClient(Renderer(None)), None):
        assert server(engine).get("/mm_ext/health").status_code == 200
    detach_runtime(off.renderer)
    off.dead = True
    assert server(EngineClient(Renderer(None))).get("/mm_ext/health").status_code == 200


def test_a_server_that_starts_is_not_yet_healthy() -> None:
    app = FastAPI()
    HealthRoute().attach_to(app)
    answer = TestClient(app).get("/mm_ext/health")
    assert answer.status_code == 503
    assert answer.json()["problems"] == {"engine": "It starts."}
