"""What live sessions made of a file is found after they have ended, within bounds."""

from __future__ import annotations

import math
import time

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.sight.ended_sessions import EndedSessions, SessionHashes, first_halves
from vllm_mm_ext.sight.seen_media import unknown_digest

DIGESTS = [f"{n:064x}"[::-1] for n in range(1, 6)]
HASHES = [f"h{n}" for n in range(8)]

ENDED = st.lists(
    st.tuples(
        st.lists(st.sampled_from(DIGESTS), max_size=3, unique=True),
        st.lists(st.sampled_from(HASHES), max_size=4, unique=True),
    ),
    max_size=20,
)


@given(ended=ENDED, gone=st.sets(st.sampled_from(DIGESTS)))
def test_what_was_made_of_a_file_is_found_until_the_file_is_forgotten(
    ended: list[tuple[list[str], list[str]]], gone: set[str]
) -> None:
    sessions = EndedSessions()
    for digests, hashes in ended:
        sessions.add(first_halves(digests), hashes)

    def expected(digest: str) -> set[str]:
        return {one for digests, hashes in left if digest in digests for one in hashes}

    left = ended
    assert all(sessions.hashes_of([one]) == expected(one) for one in DIGESTS)
    sessions.forget(gone, before=math.inf)
    left = [one for one in ended if gone.isdisjoint(one[0])]
    assert all(sessions.hashes_of([one]) == expected(one) for one in DIGESTS)


@given(ended=ENDED, most=st.integers(1, 12))
def test_memory_is_bounded_and_the_last_session_is_known(
    ended: list[tuple[list[str], list[str]]], most: int
) -> None:
    sessions = EndedSessions(most)
    for digests, hashes in ended:
        sessions.add(first_halves(digests), hashes)
        if digests and hashes:
            assert {*hashes} <= sessions.hashes_of(digests[:1])
        kept = [(one.files, one.hashes) for one in sessions._sessions]
        count = sum(len(files) + len(hashes) for files, hashes in kept)
        assert count == sessions._count
        assert count <= most or len(kept) == 1


def test_a_session_that_ended_since_is_not_forgotten() -> None:
    sessions = EndedSessions()
    sessions.add(first_halves(DIGESTS[:1]), ["before"])
    before = time.monotonic()
    sessions.add(first_halves(DIGESTS[:1]), ["since"])
    sessions.forget(DIGESTS, before)
    assert sessions.hashes_of(DIGESTS) == {"since"}


def test_a_digest_that_is_not_known_is_of_no_file_of_a_session() -> None:
    assert first_halves([unknown_digest("http://a/b"), DIGESTS[0]]) == {
        bytes.fromhex(DIGESTS[0])[:16]
    }


@given(prompts=st.lists(st.sets(st.sampled_from(HASHES), max_size=5), min_size=1, max_size=30))
def test_the_hashes_of_the_last_prompts_are_known_and_bounded(prompts: list[set[str]]) -> None:
    hashes = SessionHashes(most=6)
    last = set[str]()
    for prompt in prompts:
        told = hashes.latest()
        told |= prompt
        # What an earlier prompt still adds is known, too.
        assert prompt | last <= hashes.all()
        assert len(hashes.all()) <= 2 * (2 + 5)
        last = prompt
