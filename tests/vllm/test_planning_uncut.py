"""Planning where the server's set-up leaves videos to stock vLLM: nothing is counted or reduced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from front import Front, opened
from vllm.exceptions import VLLMValidationError

from vllm_mm_ext.testing.media import make_clip


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("uncut")
    make_clip(files / "short.mp4", duration=4, seed=1)
    sampling = {"fps": 2.0, "max_frames": 64, "min_frames": 2}
    config = {"media": {"sampling": sampling}, "compression": {"reduction": {"pool": 2}}}
    with opened(files, video_pruning_rate=0.5, additional_config={"mm_ext": config}) as made:
        yield made


def test_the_server_s_reduction_is_not_applied(front: Front) -> None:
    (video,) = front.render("short.mp4").videos
    assert (video["frames"], video["lowered"], video["reduction"]["pool"]) == (8, [], 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": {"pool": 2}}, r"mm_ext\.reduction.*as this server is set up.*reductions"),
        ({"total_tokens": 100}, r"mm_ext\.total_tokens.*as this server is set up.*max_frames"),
    ],
)
def test_what_needs_counting_is_refused(front: Front, options: dict[str, Any], words: str) -> None:
    with pytest.raises(VLLMValidationError, match=words):
        front.render("short.mp4", options=options)


def test_frames_are_as_asked(front: Front) -> None:
    (video,) = front.render("short.mp4", options={"max_frames": 4}).videos
    assert video["frames"] == 4
