"""The simulated fleet: what holds for any traffic."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fleet import STEP, TRAFFIC, VIDEO, fleet, serve

from vllm_mm_ext.fleet.figures import figures
from vllm_mm_ext.fleet.side_by_side import Study, TraceFile, side_by_side
from vllm_mm_ext.fleet.simulated_routers import ROUTERS
from vllm_mm_ext.fleet.simulation import Failure, random_failures
from vllm_mm_ext.fleet.traffic import Ask
from vllm_mm_ext.fleet.traffic_file import TraceError

_TRAFFIC = st.builds(
    replace,
    st.just(TRAFFIC),
    requests=st.integers(1, 120),
    rate=st.sampled_from([0.2, 3.0, 40.0]),
    videos=st.sampled_from([1, 5, 200]),
    turns=st.sampled_from([1.0, 4.0]),
    think_s=st.sampled_from([0.0, 5.0]),
    live=st.sampled_from([0, 0, 2]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=25)
@given(_TRAFFIC, st.sampled_from(sorted(ROUTERS)), st.sampled_from([0, 1]), st.integers(0, 5))
def test_every_request_is_answered_once_or_refused_whatever_fails(
    traffic, routing, encoders, failures
):
    died = random_failures(failures, 3, traffic.requests / traffic.rate, 2.0, traffic.seed)
    tally = serve(traffic.asks(), routing, served_by=fleet(3, encoders), failures=died)
    assert tally.sent == traffic.requests
    assert tally.answered + tally.refused == tally.sent
    assert 0 <= tally.found_tokens <= tally.prompt_tokens
    assert 0 <= tally.encoded_tokens <= tally.media_tokens
    assert all(0 <= busy <= tally.seconds * 1.001 for busy in tally.busy_s)


@settings(max_examples=10)
@given(_TRAFFIC, st.sampled_from(sorted(ROUTERS)))
def test_the_same_seed_gives_the_same_figures(traffic, routing):
    one, other = (figures(serve(traffic.asks(), routing), 1) for _ in range(2))
    assert one == other


@settings(max_examples=10)
@given(_TRAFFIC, st.sampled_from(sorted(ROUTERS)))
def test_no_cache_has_what_was_never_computed_there(traffic, routing):
    asks = list(traffic.asks())
    tally = serve(asks, routing)
    different = {ask.media: ask.kind for ask in asks if ask.media >= 0}
    needed = sum((VIDEO.tokens, 20)[kind] for kind in different.values())
    # Each is encoded at least once, and computed once, but for refused prompts.
    if not tally.refused:
        assert tally.encoded_tokens >= needed
        assert tally.prompt_tokens - tally.found_tokens >= needed


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_frames_kept_for_more_videos_are_never_decoded_more_often(seed, room):
    asks = list(replace(TRAFFIC, seed=seed, turns=1.0, rate=0.1, requests=80).asks())
    one = fleet(1, decoded_bytes=room * VIDEO.decoded_bytes)
    more = fleet(1, decoded_bytes=2 * room * VIDEO.decoded_bytes)
    assert serve(asks, served_by=more).decodes <= serve(asks, served_by=one).decodes


@pytest.mark.parametrize("seed", range(3))
def test_media_keys_find_more_in_caches_than_taking_turns(seed):
    traffic = replace(TRAFFIC, requests=1500, videos=40, seed=seed)
    by_key, in_turn = (serve(traffic.asks(), name) for name in ("media-key", "round-robin"))
    assert by_key.found_tokens > in_turn.found_tokens
    assert by_key.encoded_tokens < 0.6 * in_turn.encoded_tokens
    assert by_key.all.p50 < in_turn.all.p50


def test_a_single_replica_does_the_same_whatever_the_router():
    alone = fleet(1)
    found = {tuple(figures(serve(TRAFFIC.asks(), name, served_by=alone), 1)) for name in ROUTERS}
    assert len(found) == 1


def test_a_request_on_an_idle_replica_takes_what_its_work_costs():
    asks = [Ask(0.0, 1, 7, 0, 20, 11), Ask(100.0, 1, -1, 0, 20, 11, last=True)]
    tally = serve(asks, served_by=fleet(1))
    prompt = VIDEO.tokens + 20
    front = 1e-3 + VIDEO.decode_s + VIDEO.preprocess_s + VIDEO.main_s
    step = STEP.step + STEP.prompts + STEP.encodes
    assert tally.first.p50 == pytest.approx(front + VIDEO.encode_s + step + prompt * STEP.prefill)
    # The answer's last token has no KV yet; blocks have 16 tokens.
    found = (prompt + 10) // 16 * 16
    assert tally.later_found == found
    again = (prompt + 31 - found) * STEP.prefill
    assert tally.later.p50 == pytest.approx(1.5e-3 + STEP.step + STEP.prompts + again)


def test_on_one_core_the_engine_waits_for_what_the_front_end_does_meanwhile():
    asks = [Ask(0.0, number, -1, 0, 20, 1, last=True) for number in range(2)]
    shared, apart = (serve(asks, served_by=fleet(1, cores=cores)) for cores in (1, 2))
    step = STEP.step + STEP.prompts + 20 * STEP.prefill
    assert apart.seconds == pytest.approx(1e-3 + 2 * step)
    # While the first one is computed, the second one is read.
    assert shared.seconds == pytest.approx(2e-3 + 2 * step)


def test_clients_that_wait_for_answers_have_no_more_requests_under_way_than_they_are():
    asks = [Ask(5.0, number, -1, 0, 20, 1, last=True) for number in range(6)]
    one, two, all_at_once = (
        serve(asks, served_by=fleet(1), clients=clients) for clients in (1, 2, math.inf)
    )
    alone = 1e-3 + STEP.step + STEP.prompts + 20 * STEP.prefill
    assert one.answered == two.answered == all_at_once.answered == 6
    assert one.seconds == pytest.approx(5.0 + 6 * alone)
    assert one.all.p99 == pytest.approx(alone, rel=0.02)
    assert alone < two.all.p99 < all_at_once.all.p99


def test_a_medium_that_caches_hold_costs_what_is_measured_of_such_media():
    costs = replace(VIDEO, again_s=0.05, inputs_s=0.01)
    asks = [Ask(0.0, 1, 7, 0, 20, 1), Ask(100.0, 1, -1, 0, 20, 1, last=True)]
    usual, dearer = (
        serve(asks, served_by=replace(fleet(1), kinds=(kind,))) for kind in (VIDEO, costs)
    )
    more = costs.again_s - VIDEO.again_s + costs.inputs_s
    assert dearer.later.p50 - usual.later.p50 == pytest.approx(more, rel=0.02)


def test_thousands_that_wait_for_a_session_whose_prompts_are_too_long_are_all_refused():
    # The first answer takes until the others wait, and leaves a conversation too long to go on.
    first = Ask(0.0, 1, 7, 0, 20, 11)
    asks = [first, *(Ask(0.001, 1, -1, 0, 1_000_000, 1) for _ in range(3000))]
    tally = serve(asks, served_by=fleet(1))
    assert (tally.sent, tally.answered, tally.refused) == (3001, 1, 3000)


def test_what_waits_behind_the_last_request_of_a_session_is_another_conversation():
    asks = [Ask(0.0, 1, 7, 0, 20, 11, last=True), *(Ask(0.001, 1, 7, 0, 20, 11) for _ in range(3))]
    tally = serve(asks, served_by=fleet(1))
    assert (tally.sent, tally.answered) == (4, 4)


def test_a_replica_that_died_comes_back_empty_and_its_requests_are_sent_again():
    asks = [Ask(10.0 * turn, 1, 7 if not turn else -1, 0, 20, 11) for turn in range(4)]
    whole = serve(asks, served_by=fleet(1))
    assert whole.encoded_tokens == VIDEO.tokens
    died = serve(asks, served_by=fleet(1), failures=[Failure(15.0, 0, 16.0)])
    assert died.encoded_tokens == 2 * VIDEO.tokens
    assert died.sent_again == 0
    # The request under way waits until the replica is back.
    cut = serve(asks, served_by=fleet(1), failures=[Failure(0.2, 0, 5.0)])
    assert (cut.answered, cut.sent_again) == (4, 1)
    assert cut.first.p50 > 4.9


def test_encoder_instances_encode_in_place_of_replicas():
    tally = serve(TRAFFIC.asks(), served_by=fleet(3, 1))
    assert sum(tally.encoder_busy_s) > 0
    alone = serve(TRAFFIC.asks(), served_by=fleet(3))
    assert sum(tally.busy_s) < sum(alone.busy_s)
    assert tally.answered == alone.answered


def test_the_first_requests_do_not_count_when_asked_not_to():
    tally = serve(TRAFFIC.asks(), unmeasured=TRAFFIC.requests)
    assert tally.answered == TRAFFIC.requests
    assert tally.prompt_tokens == 0
    assert math.isnan(tally.all.p50)


def test_routers_side_by_side_are_what_each_is_alone(tmp_path):
    study = Study(fleet(), TRAFFIC)
    names = ["round-robin", "media-key"]
    told: list[list[int]] = []
    tallies = side_by_side(study, names, lambda sent: told.append(list(sent)))
    assert [figures(one, 1) for one in tallies] == [figures(study.run(name), 1) for name in names]
    assert told[-1] == [TRAFFIC.requests] * 2
    bad = tmp_path / "trace.jsonl"
    bad.write_text('{"at": 1}\n')
    with pytest.raises(TraceError, match=r"trace.jsonl:1.*session"):
        side_by_side(Study(fleet(), TraceFile(bad, 1)), [*names, "random"], lambda _: None)
