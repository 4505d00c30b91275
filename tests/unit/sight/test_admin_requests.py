"""What an operator asks is checked, and errors say what is valid."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from vllm_mm_ext.sight.admin_requests import MediaRequest, SessionRequest, problem_of


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "one of url and digest"),
        ({"url": "http://a", "digest": "0" * 64}, "one of url and digest"),
        ({"digest": "xyz"}, "64 lower-case hex digits"),
        ({"url": "data:video/mp4;base64,AA"}, "digest of the file"),
        ({"url": "http://a", "force": True}, "force: Extra inputs"),
    ],
)
def test_a_file_is_named_in_one_way(body: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as raised:
        MediaRequest.model_validate(body)
    assert says in problem_of(raised.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"cache_salt": "x"}, "give one of session_id and key"),
        ({"session_id": "a", "key": "a"}, "give one of session_id and key"),
        ({"cache_salt": "x", "key": "a"}, "stands for the cache_salt"),
    ],
)
def test_a_session_is_named_in_one_way(body: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as raised:
        SessionRequest.model_validate(body)
    assert says in problem_of(raised.value)


@pytest.mark.parametrize(
    "named",
    [
        {"session_id": "a"},
        {"session_id": "a", "cache_salt": "s"},
        {"session_id": "a" * 100},
        {"session_id": "a" * 100, "cache_salt": "s"},
    ],
)
def test_a_session_is_found_by_the_key_that_is_listed(named: dict[str, str]) -> None:
    listed = SessionRequest.model_validate(named).kv_key
    assert SessionRequest.model_validate({"key": listed}).kv_key == listed
