"""What the scheduler says or refuses when it starts, and what it does where it limits less."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from scheduler_harness import Play, make_scheduler, request


def whole_prompts(config: Any) -> None:
    config.scheduler_config.enable_chunked_prefill = False


def whole_items(config: Any) -> None:
    config.scheduler_config.disable_chunked_mm_input = True


def encoder_decoder(config: Any) -> None:
    # vLLM works it out of the model's configuration, once.
    config.model_config.__dict__["is_encoder_decoder"] = True


def diffusion(config: Any) -> None:
    config.model_config.__dict__["is_diffusion"] = True


def few_slots(config: Any) -> None:
    config.scheduler_config.max_num_seqs = 3


SAID = {
    "chunked prefill off": (whole_prompts, "prefill is not limited"),
    "mm items whole": (whole_items, "prefill is not limited"),
    "encoder and decoder": (encoder_decoder, "of encoder-decoder models is left to vLLM"),
    "fewer than four slots": (few_slots, "text_slots is 1, but at most a quarter of the 3 slots"),
}


@pytest.fixture(scope="module", autouse=True)
def logging_is_set_up() -> None:
    """The first engine configuration of a process takes pytest's handlers away."""
    make_scheduler()


@pytest.mark.parametrize("case", SAID)
def test_what_is_off_is_said_when_the_engine_starts(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = SAID[case]
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        make_scheduler()
        assert "mm_ext" not in caplog.text
        make_scheduler(change=change)
    assert words in caplog.text


def test_diffusion_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="diffusion models need vLLM's own scheduler"):
        make_scheduler(change=diffusion)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_with_chunked_prefill_off_no_prompt_is_cut(known: bool, asynchronous: bool) -> None:
    """A pooling model that needs all of a prompt at once would end the engine."""
    settings = {"target_itl_ms": 40.0}
    scheduler = make_scheduler(
        slots=8,
        max_tokens=4096,
        encoder_tokens=4096,
        settings=settings,
        change=whole_prompts,
        asynchronous=asynchronous,
    )
    play = Play(scheduler, depth=1 + asynchronous)
    if known:
        play.add(request("first", items=[300] * 2, answer=1))
        play.run()
    play.add(request("text", text=32, answer=60))
    play.step()
    videos = [request(f"video{n}", text=40, items=[300] * (3 + n % 8), answer=4) for n in range(20)]
    for one in videos:
        play.add(one)
        play.step()
    play.run()
    for one in videos:
        began = next(o for o in play.steps if one.request_id in o.num_scheduled_tokens)
        assert began.num_scheduled_tokens[one.request_id] == one.num_prompt_tokens
    assert all(timing.ended is not None for timing in play.timings.values())


def test_with_chunked_prefill_off_media_larger_than_the_cache_stop_nobody() -> None:
    scheduler = make_scheduler(max_tokens=4096, encoder_tokens=1000, change=whole_prompts)
    play = Play(scheduler)
    play.add(request("text", text=32, answer=60), request("large", items=[300] * 6, answer=4))
    play.add(*[request(f"video{n}", items=[300] * 2, answer=4) for n in range(4)])
    play.run(most=400)


@pytest.mark.parametrize("change", [whole_prompts, whole_items])
def test_where_prefill_is_not_limited_everything_is_still_answered_and_text_passes_videos(
    change: Callable[[Any], None],
) -> None:
    settings = {"target_itl_ms": 40.0}
    play = Play(make_scheduler(slots=4, max_tokens=4096, settings=settings, change=change))
    play.add(request("first", text=32, answer=40))
    play.step()
    play.add(*(request(f"video{n}", items=[300] * 6, answer=4) for n in range(6)))
    play.step()
    play.add(request("text", text=32, answer=4))
    play.run()
    assert all(timing.ended is not None for timing in play.timings.values())
    text = play.timings["text"].ended
    assert text is not None
    ended = sorted(play.timings[f"video{n}"].ended or 0.0 for n in range(6))
    assert text < ended[1]


def test_with_chunked_prefill_off_such_media_are_served_while_text_comes_all_the_time() -> None:
    settings = {"target_itl_ms": 40.0, "aging_s": 2.0}
    scheduler = make_scheduler(
        max_tokens=4096, encoder_tokens=1000, change=whole_prompts, settings=settings
    )
    play = Play(scheduler)
    coming = [(0.25 * n, request(f"t{n}", text=32, answer=40)) for n in range(200)]
    coming += [(0.5, request("large", items=[300] * 6, answer=4))]
    coming += [(n, request(f"v{n}", items=[300] * 2, answer=4)) for n in range(1, 9)]
    play.play(coming, until=40.0)
    assert all(timing.tokens and timing.wait < 2.0 for timing in play.timings.values())
