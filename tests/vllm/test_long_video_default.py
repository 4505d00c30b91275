"""Which chat completions are answered window by window."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_mm_ext.adapters.long_video.beginning import asked_of
from vllm_mm_ext.adapters.serving.requests import OptionError
from vllm_mm_ext.config.long_video_settings import LongVideoOptions, LongVideoSettings
from vllm_mm_ext.config.options import RequestOptions
from vllm_mm_ext.request.context import RequestContext

TEXT = {"type": "text", "text": "What happens?"}
VIDEO = {"type": "video_url", "video_url": {"url": "https://host/clip.mp4"}}


def asked(
    *parts: Any,
    default: str = "off",
    options: RequestOptions | None = None,
    disaggregated: bool = False,
) -> LongVideoOptions | None:
    request = ChatCompletionRequest(messages=[{"role": "user", "content": [*parts]}])
    settings = LongVideoSettings.model_validate({"default": default})
    context = RequestContext(options or RequestOptions(), disaggregated=disaggregated)
    return asked_of(context, settings, request)


def test_a_request_that_does_not_ask_is_answered_in_one_prompt() -> None:
    assert asked(VIDEO, TEXT) is None


def test_a_default_holds_for_requests_with_a_video_alone() -> None:
    found = asked(VIDEO, TEXT, default="search")
    assert found is not None
    assert found.strategy == "search"
    assert asked(TEXT, default="search") is None


@pytest.mark.parametrize(
    ("default", "strategy", "expected"),
    [("off", None, "auto"), ("rolling", None, "rolling"), ("rolling", "search", "search")],
)
def test_a_request_that_asks_goes_before_the_default(
    default: str, strategy: Any, expected: str
) -> None:
    options = RequestOptions(long_video=LongVideoOptions(strategy=strategy))
    found = asked(VIDEO, TEXT, default=default, options=options)
    assert found is not None
    assert found.strategy == expected


def test_the_frame_rate_of_the_request_is_that_of_its_windows_unless_they_have_their_own() -> None:
    for own, expected in ((None, 3.0), (1.0, 1.0)):
        options = RequestOptions(fps=3.0, long_video=LongVideoOptions(fps=own))
        found = asked(VIDEO, TEXT, options=options)
        assert found is not None
        assert found.fps == expected


def test_to_ask_without_a_video_is_an_error() -> None:
    with pytest.raises(OptionError, match="video_url") as error:
        asked(TEXT, options=RequestOptions(long_video=LongVideoOptions()))
    assert error.value.parameter == "mm_ext.long_video"


def test_what_two_servers_answer_together_is_asked_in_one_prompt() -> None:
    assert asked(VIDEO, TEXT, default="search", disaggregated=True) is None
    one = RequestOptions(long_video=LongVideoOptions(strategy="single"))
    found = asked(VIDEO, TEXT, options=one, disaggregated=True)
    assert found is not None
    assert found.strategy == "single"
    for strategy in (None, "search"):
        options = RequestOptions(long_video=LongVideoOptions(strategy=strategy))
        with pytest.raises(OptionError, match="take: single"):
            asked(VIDEO, TEXT, options=options, disaggregated=True)
