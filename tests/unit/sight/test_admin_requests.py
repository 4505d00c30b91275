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


def test_a_session_needs_an_id() -> None:
    with pytest.raises(ValidationError) as raised:
        SessionRequest.model_validate({"cache_salt": "x"})
    assert problem_of(raised.value) == "session_id: Field required"
