"""The text beside media: truncation leaves media whole, and text stays text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from front import Front, opened
from vllm.exceptions import VLLMValidationError

from vllm_mm_ext.testing.media import make_clip


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("front")
    make_clip(files / "short.mp4", duration=4, seed=1)
    make_clip(files / "other.mp4", duration=6, scene="pan", seed=2)
    with opened(files) as made:
        yield made


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("limit", [1, 10, 16, 20, 60, 200])
def test_truncation_that_would_cut_a_video_is_refused(
    front: Front, limit: int, side: str | None
) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        front.render("short.mp4", truncate_prompt_tokens=limit, truncation_side=side)
    assert caught.value.parameter == "truncate_prompt_tokens"


def test_truncation_may_cut_the_text_beside_a_video(front: Front) -> None:
    text = "a long question " * 20
    whole = front.render("short.mp4", text=text)
    limit = whole.prompt_tokens - 50
    cut = front.render(
        "short.mp4", text=text, truncate_prompt_tokens=limit, truncation_side="right"
    )
    assert (cut.prompt_tokens, cut.video_tokens) == (limit, whole.video_tokens)
