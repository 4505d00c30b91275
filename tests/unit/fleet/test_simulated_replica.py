"""Parts of a simulated replica: engine steps, KV cache, encoder outputs, front-end."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fleet import HOST, STEP, VIDEO

from vllm_mm_ext.config.scheduler_settings import SchedulerSettings
from vllm_mm_ext.fleet.encoder_outputs import EncoderOutputs
from vllm_mm_ext.fleet.fluid_engine import FluidEngine, PromptWork
from vllm_mm_ext.fleet.front import Front
from vllm_mm_ext.fleet.prompt_cache import Held, Prompt, PromptCache
from vllm_mm_ext.fleet.replica import Conversation
from vllm_mm_ext.fleet.shared_cores import SharedCores

_TARGET_S = SchedulerSettings().target_itl_ms / 1e3
_STEP_S = STEP.step + STEP.prompts


class Played:
    """An engine, and when each of its requests got its first token and its answer."""

    def __init__(self, work: dict[str, PromptWork], slots: int = 8) -> None:
        self.first: dict[str, float] = {}
        self.answered: dict[str, float] = {}
        self.engine: FluidEngine[str] = FluidEngine(STEP, slots, 8192, work.__getitem__)
        self.work = work

    def add(self, at: float, name: str, output: int = 1) -> None:
        self.until(at)
        work = self.work[name]
        self.engine.add(at, name, work.tokens, output, work.seconds)

    def until(self, at: float = math.inf) -> Played:
        while (now := self.engine.next_event()) <= at and now < math.inf:
            ended = self.engine.run(now)
            self.first |= dict.fromkeys(ended.first, now)
            self.answered |= dict.fromkeys(ended.answered, now)
        return self


def texts(**seconds: float) -> dict[str, PromptWork]:
    return {name: PromptWork(took, 100, False) for name, took in seconds.items()}


def test_an_answer_takes_a_step_for_each_token():
    played = Played(texts(a=0.02))
    played.add(1.0, "a", output=11)
    played.until()
    assert played.first["a"] == pytest.approx(1.0 + _STEP_S + 0.02)
    decoding = 10 * (STEP.step + STEP.decodes)
    assert played.answered["a"] == pytest.approx(played.first["a"] + decoding, rel=1e-3)
    assert played.engine.busy_s == pytest.approx(played.answered["a"] - 1.0)


def test_prompts_share_a_step_and_the_shorter_one_goes_first():
    played = Played(texts(long=3.0, a=0.4, b=0.3))
    played.add(0.0, "long")
    played.add(0.01, "a")
    played.add(0.01, "b")
    played.until()
    # The long one has begun, and waits.
    assert played.first["a"] == played.first["b"] < played.first["long"]
    assert played.first["long"] == pytest.approx(3.7, rel=0.1)


def test_beside_decodes_a_prompt_gets_what_is_left_of_the_target():
    played = Played(texts(a=0.0, video=2.0))
    played.add(0.0, "a", output=100_000)
    played.add(1.0, "video")
    played.until(60.0)
    base = STEP.step + STEP.decodes
    share = (_TARGET_S - base - STEP.prompts) / _TARGET_S
    assert played.first["video"] - 1.0 == pytest.approx(2.0 / share, rel=0.05)


def test_no_more_requests_run_than_there_are_slots():
    names = {f"r{number}": 0.01 for number in range(6)}
    played = Played(texts(**names), slots=2)
    for name in names:
        played.add(0.0, name, output=20)
    played.until()
    ends = sorted(played.answered.values())
    firsts = sorted(played.first.values())
    assert all(first >= end for first, end in zip(firsts[2:], ends, strict=False))
    assert len(ends) == 6


def test_who_waited_long_goes_before_shorter_ones():
    names = {f"r{number}": 0.9 for number in range(60)}
    played = Played(texts(long=1.5, **names), slots=1)
    for number, name in enumerate(names):
        played.add(0.8 * number, name)
        if not number:
            played.add(0.1, "long")
    played.until()
    assert 15 < played.first["long"] - 0.1 < 20


class Blocks:
    """A KV cache with room for everything, block by block."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._cached: set[tuple[object, ...]] = set()

    def found(self, prompt: Prompt) -> int:
        """Tokens of a prompt that are cached."""
        names = self._names(prompt)
        known = list(itertools.takewhile(self._cached.__contains__, names))
        return min(len(known), (prompt.tokens - 1) // self._size) * self._size

    def computed(self, prompt: Prompt) -> None:
        """A prompt is computed."""
        self._cached.update(self._names(prompt))

    def answered(self, prompt: Prompt) -> None:
        """Its answer is there, and is part of later prompts; of its last token there is no KV."""
        if prompt.kept:
            self._cached.update(self._names(prompt, prompt.output - 1))

    def _names(self, prompt: Prompt, more: int = 0) -> list[tuple[object, ...]]:
        head = prompt.head_pieces[-1][1] if prompt.head_pieces else 0
        return [
            ("medium", prompt.head, place)
            if (place + 1) * self._size <= head
            else (prompt.rest_key, place)
            for place in range((prompt.tokens + more) // self._size)
        ]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(-1, 3), st.integers(1, 300), st.integers(1, 40)),
        max_size=60,
    ),
    st.one_of(st.integers(20, 120), st.just(100_000)),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_what_is_found_is_what_a_cache_of_blocks_has_and_all_blocks_are_accounted_for(
    asks, blocks, items, random
):
    cache, reference = PromptCache(blocks, 16, 256), Blocks(16)
    talks: dict[int, Conversation] = {}
    running: list[Held] = []
    computed: list[Held] = []
    for number, video, text, output in asks:
        talk = talks.setdefault(number, Conversation(number))
        talk.say(-1 if talk.tokens else video, 0, 400, text, items)
        prompt = talk.prompt(output, kept=random.random() < 0.5)
        if not cache.fits(prompt):
            talks.pop(number)
            continue
        known = cache.found(prompt)
        held = cache.admit(prompt)
        if held is not None:
            assert known == held.found < prompt.tokens
            # With room for everything as much is found, with less room at most as much.
            most = reference.found(prompt)
            assert held.found == most if blocks == 100_000 else held.found <= most
            running.append(held)
            talk.tokens += output
        cache.check_integrity((*running, *computed))
        if running and random.random() < 0.6:
            computed.append(running.pop(random.randrange(len(running))))
            cache.computed(computed[-1])
            reference.computed(computed[-1].prompt)
        if computed and random.random() < 0.6:
            held = computed.pop(random.randrange(len(computed)))
            cache.release(held)
            reference.answered(held.prompt)
        cache.check_integrity((*running, *computed))
    for held in running:
        cache.computed(held)
    for held in (*running, *computed):
        cache.release(held)
    cache.check_integrity(())


@pytest.mark.parametrize(("num_bytes", "parts"), [(1_600, 4), (16_000, 1), (1, 4)])
def test_media_are_cut_as_finely_as_the_cache_is_small(num_bytes, parts):
    assert EncoderOutputs(num_bytes).parts(VIDEO.items, VIDEO.output_bytes) == parts


@given(st.lists(st.integers(0, 8), max_size=80), st.integers(1, 5))
def test_outputs_are_encoded_again_only_when_they_were_evicted(media, room):
    outputs = EncoderOutputs(room * 1_000)
    parts = outputs.parts(4, 1_000)
    encoded = [outputs.use(str(one), parts, 0, 1_000, 1.0) for one in media]
    assert sum(encoded) >= parts * len(set(media))
    if len(set(media)) <= room:
        assert sum(encoded) == parts * len(set(media))
        assert all(outputs.holds(str(one)) for one in media)


def test_a_medium_is_decoded_once_for_all_that_ask_and_as_many_at_a_time_as_there_are_workers():
    front = Front(HOST, 2, 10 * VIDEO.decoded_bytes, SharedCores())
    one = VIDEO.decode_s + VIDEO.preprocess_s + VIDEO.main_s
    assert front.medium(0.0, 1, VIDEO) == pytest.approx(one)
    assert front.medium(0.01, 1, VIDEO) == pytest.approx(one)
    front.medium(0.0, 2, VIDEO)
    # The third waits for a worker.
    assert front.medium(0.0, 3, VIDEO) == pytest.approx(one + VIDEO.decode_s)
    assert front.medium(9.0, 3, VIDEO) == pytest.approx(9.0 + VIDEO.again_s)
    assert front.decodes == 3
