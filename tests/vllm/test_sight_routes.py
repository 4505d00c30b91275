"""The operator's routes answer as the server's settings say, and say what is wrong."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from vllm_mm_ext.adapters.sight.sight_routes import SightRoutes, page
from vllm_mm_ext.base.peers import PeerError
from vllm_mm_ext.config.sight_settings import SightSettings
from vllm_mm_ext.policies.kv.control import NoBlockPoolError
from vllm_mm_ext.policies.kv.sessions import session_key
from vllm_mm_ext.sight.running_requests import RunningRequests

DIGEST = "ab" * 32


class Service:
    """Stands in for the processes of a service."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.left: list[str] = []
        self.keeps_kv = True
        self.before: float | None = None

    async def overview(self) -> dict[str, Any]:
        return {"requests": []}

    async def requests(self, before: float) -> list[dict[str, Any]]:
        self.before = before
        return []

    async def record(self, request_id: str) -> dict[str, Any] | None:
        if request_id == "down":
            raise PeerError("API server 1 does not answer")
        return {"id": request_id} if request_id == "0-1" else None

    async def session(self, *asked: Any) -> None:
        if not self.keeps_kv:
            raise NoBlockPoolError
        self.asked.append(asked)

    async def end_session(self, session_id: str) -> bool:
        return session_id == "sess_1"

    async def media(self, *asked: Any) -> dict[str, Any] | None:
        if not self.keeps_kv:
            raise NoBlockPoolError
        if asked[1] == "http://h/unknown":
            return None
        self.asked.append(asked)
        return {"items": 1}

    async def take_down(self, *asked: Any) -> dict[str, Any]:
        self.asked.append(asked)
        return {"complete": not self.left, "left": self.left}


class Keys:
    def verify_token(self, headers: Headers) -> bool:
        return headers.get("authorization") == "Bearer secret"


def client(settings: SightSettings, *, keys: Any = None) -> tuple[TestClient, Service]:
    routes, app, service = SightRoutes(RunningRequests()), FastAPI(), Service()
    routes.attach_to(app)
    routes._settings, routes._keys = settings, keys
    routes._service = service if settings.page else None  # type: ignore[assignment]
    return TestClient(app), service


def test_a_server_without_the_page_has_none_of_it() -> None:
    asking, _ = client(SightSettings())
    for path in ("/mm_ext/", "/mm_ext/sight", "/mm_ext/requests?before=1", "/mm_ext/requests/0-1"):
        answer = asking.get(path)
        assert answer.status_code == 404
        assert "mm_ext.sight.page" in answer.json()["error"]["message"]
    assert asking.post("/mm_ext/media/drop", json={"digest": DIGEST}).status_code == 404


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("?before=1700000000.123", 1700000000.123), ("?before=-1", -1.0)]
    + [(asked, None) for asked in ("", "?before=", "?before=x", "?before=nan", "?before=1e999")],
)
def test_older_requests_are_asked_for_by_a_time(asked: str, expected: float | None) -> None:
    asking, service = client(SightSettings(page=True))
    answer = asking.get(f"/mm_ext/requests{asked}")
    assert answer.status_code == (400 if expected is None else 200)
    assert service.before == expected


def test_who_may_only_look_changes_nothing() -> None:
    asking, service = client(SightSettings(page=True))
    assert asking.get("/mm_ext/sight").json() == {"requests": [], "admin": False}
    answer = asking.post("/mm_ext/media/drop", json={"digest": DIGEST})
    assert answer.status_code == 403
    assert "mm_ext.sight.admin" in answer.json()["error"]["message"]
    assert not service.asked


def test_with_a_key_only_the_page_itself_is_for_everybody() -> None:
    asking, service = client(SightSettings(page=True, admin=True), keys=Keys())
    assert asking.get("/mm_ext/").status_code == 200
    assert asking.get("/mm_ext/sight").status_code == 401
    assert asking.post("/mm_ext/media/drop", json={"digest": DIGEST}).status_code == 401
    assert not service.asked
    headers = {"Authorization": "Bearer secret"}
    assert asking.get("/mm_ext/sight", headers=headers).status_code == 200


def test_what_an_operator_asks_reaches_the_service() -> None:
    asking, service = client(SightSettings(page=True, admin=True))
    session = {"session_id": "a", "cache_salt": "s"}
    assert asking.post("/mm_ext/sessions/pin", json=session).status_code == 200
    listed = session_key("a", "s")
    assert asking.post("/mm_ext/sessions/release", json={"key": listed}).status_code == 200
    assert asking.post("/mm_ext/sessions/end", json={"key": "sess_1"}).status_code == 404
    assert asking.post("/mm_ext/media/pin", json={"url": "http://h/v"}).json() == {"items": 1}
    unknown = {"url": "http://h/unknown"}
    assert asking.post("/mm_ext/media/unpin", json=unknown).status_code == 404
    assert asking.post("/mm_ext/media/drop", json={"digest": DIGEST}).json()["complete"]
    assert service.asked == [
        ("pin", listed),
        ("release", listed),
        ("pin", "http://h/v", None),
        (None, DIGEST),
    ]
    assert asking.post("/mm_ext/sessions/end", json={"session_id": "sess_1"}).json()["ended"]
    assert asking.post("/mm_ext/sessions/end", json={"session_id": "sess_2"}).status_code == 404


def test_where_no_kv_is_kept_nothing_is_pinned_and_the_operator_is_told_why() -> None:
    asking, service = client(SightSettings(page=True, admin=True))
    service.keeps_kv = False
    for path, body in (("sessions", {"session_id": "a"}), ("media", {"digest": DIGEST})):
        answer = asking.post(f"/mm_ext/{path}/pin", json=body)
        assert answer.status_code == 409
        assert "mm_ext.kv.enabled" in answer.json()["error"]["message"]


def test_a_takedown_that_left_something_says_so_and_may_be_asked_again() -> None:
    asking, service = client(SightSettings(page=True, admin=True))
    service.left = ["requests that did not end"]
    answer = asking.post("/mm_ext/media/drop", json={"digest": DIGEST})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert answer.json()["left"] == service.left


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/mm_ext/media/burn", {"digest": DIGEST}, 400, "pin, unpin, release, drop"),
        ("/mm_ext/media/drop", {}, 400, "one of url and digest"),
        ("/mm_ext/sessions/pin", {"session_id": ""}, 400, "session_id"),
        ("/mm_ext/sessions/pin", [], 400, "valid dictionary"),
    ],
)
def test_bad_requests_say_what_is_valid(path: str, body: Any, status: int, says: str) -> None:
    asking, service = client(SightSettings(page=True, admin=True))
    answer = asking.post(path, json=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert not service.asked


def test_a_request_that_is_forgotten_or_out_of_reach_is_told_apart() -> None:
    asking, _ = client(SightSettings(page=True))
    assert asking.get("/mm_ext/requests/0-1").json() == {"id": "0-1"}
    assert asking.get("/mm_ext/requests/0-2").status_code == 404
    assert asking.get("/mm_ext/requests/down").status_code == 503


def test_pages_of_other_origins_neither_see_nor_change_anything() -> None:
    asking, service = client(SightSettings(page=True, admin=True))
    other, own = {"Origin": "http://elsewhere"}, {"Origin": "http://testserver"}
    body = {"digest": DIGEST}
    assert asking.get("/mm_ext/sight", headers=other).status_code == 403
    assert asking.post("/mm_ext/media/drop", json=body, headers=other).status_code == 403
    form = {**own, "Content-Type": "text/plain"}
    sent = asking.post("/mm_ext/media/drop", content=json.dumps(body), headers=form)
    assert sent.status_code == 415
    assert not service.asked
    assert asking.post("/mm_ext/media/drop", json=body, headers=own).status_code == 200
    assert "frame-ancestors 'none'" in asking.get("/mm_ext/").headers["content-security-policy"]


def test_texts_that_are_no_unicode_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    asking, service = client(SightSettings(page=True, admin=True))

    async def overview() -> dict[str, Any]:
        return {"model": "half \ud800 of a pair"}

    monkeypatch.setattr(service, "overview", overview)
    assert asking.get("/mm_ext/sight").json()["model"] == "half ? of a pair"
    body = json.dumps({"url": "http://a/\ud800"})
    json_body = {"Content-Type": "application/json"}
    answer = asking.post("/mm_ext/media/drop", content=body, headers=json_body)
    assert answer.status_code in (200, 400)


def test_a_body_without_end_is_refused() -> None:
    asking, _ = client(SightSettings(page=True, admin=True))
    json_body = {"Content-Type": "application/json"}
    answer = asking.post("/mm_ext/media/drop", content=b"x" * (2 << 20), headers=json_body)
    assert answer.status_code == 400
    assert "bytes" in answer.json()["error"]["message"]
    answer = asking.post("/mm_ext/media/drop", content=b"[" * (1 << 20), headers=json_body)
    assert answer.status_code == 400
    assert "nested too deeply" in answer.json()["error"]["message"]


def test_the_page_loads_nothing_and_takes_no_text_for_markup() -> None:
    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            del tag
            found.extend(value or "" for name, value in attrs if name in ("src", "href"))

    found: list[str] = []
    Links().feed(page())
    assert found == ["data:,"]
    # URLs and notes come from clients and models.
    assert "innerHTML" not in page()
