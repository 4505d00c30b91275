"""Files and the mm items made of them find each other, within bounds."""

from __future__ import annotations

import math
import time

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.request.media_items import ImageItem, MediaItem
from vllm_mm_ext.sight.seen_media import SeenMedia, unknown_digest

Note = tuple[str, str, list[str]]

DIGESTS = [f"{n:064x}" for n in range(6)]
HASHES = [f"h{n}" for n in range(10)]
URLS = ["http://a/1", "http://a/2", "data:video/mp4;base64,AAAA", ""]

NOTES = st.lists(
    st.tuples(
        st.sampled_from(DIGESTS),
        st.sampled_from(URLS),
        st.lists(st.sampled_from(HASHES), max_size=5),
    ),
    max_size=30,
)


@given(notes=NOTES, gone=st.sets(st.sampled_from(DIGESTS)))
def test_all_items_of_a_file_are_found_until_the_file_is_forgotten(
    notes: list[Note], gone: set[str]
) -> None:
    seen = SeenMedia()
    model: dict[str, tuple[set[str], set[str]]] = {}
    for digest, url, hashes in notes:
        seen.note(digest, "video", url, hashes)
        known = model.setdefault(digest, (set(), set()))
        known[0].update(hashes)
        if url.startswith("http"):
            known[1].add(url)
    seen.check_integrity()
    seen.forget(gone, before=math.inf)
    seen.check_integrity()
    left = {digest: known for digest, known in model.items() if digest not in gone}
    assert len(seen) == len(left)
    for digest, (hashes, urls) in left.items():
        assert seen.hashes_of([digest]) == hashes
        assert seen.urls_of([digest]) == urls
        for url in urls:
            assert digest in seen.digests_at(url)
    assert not seen.hashes_of(gone)
    assert not seen.urls_of(gone)


@given(notes=NOTES, most=st.integers(2, 12))
def test_memory_is_bounded_and_the_file_used_last_is_known(notes: list[Note], most: int) -> None:
    seen = SeenMedia(most)
    for digest, url, hashes in notes:
        seen.note(digest, "video", url, hashes)
        seen.check_integrity()
        found = seen.hashes_of(DIGESTS)
        assert len(seen) + len(found) <= max(most, 1 + len(set(hashes)))
        assert digest in seen.digests_at(url) or not url.startswith("http")
        assert set(hashes) <= seen.hashes_of([digest])


def test_long_urls_of_many_files_take_no_more_than_their_share_of_memory() -> None:
    seen = SeenMedia(1000)
    for n in range(1000):
        for m in range(17):
            seen.note(f"{n:064x}", "video", f"http://a/{m}{'x' * 4000}", [])
    seen.check_integrity()
    found = seen.urls_of(f"{n:064x}" for n in range(1000))
    every = [url for n in range(1000) for url in seen.urls_of([f"{n:064x}"])]
    assert 400_000 < sum(map(len, every)) <= 512_000
    assert len(found) == 16
    assert len(seen.urls_of([f"{999:064x}"])) == 16


def test_a_request_with_many_files_leaves_those_of_others_known() -> None:
    seen = SeenMedia(10_000)
    for n in range(1000):
        seen.note(f"{n:064x}", "video", "", [f"video {n}"])
    pictures = [ImageItem("", f"{n:064x}") for n in range(5000, 5999)]
    seen.note_all([], pictures, [f"picture {n}" for n in range(999)])
    assert seen.hashes_of([f"{0:064x}"]) == {"video 0"}
    assert len(seen.hashes_of([f"{5000:064x}"])) == 999
    assert len(seen) == 1999


@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=4),
            st.lists(st.sampled_from(HASHES), max_size=5),
        ),
        max_size=12,
    ),
    gone=st.sets(st.sampled_from(DIGESTS)),
)
def test_to_forget_a_file_leaves_what_requests_without_it_tell_of_those_it_was_used_with(
    requests: list[tuple[list[str], list[str]]], gone: set[str]
) -> None:
    seen = SeenMedia()
    for digests, hashes in requests:
        seen.note_all([], [ImageItem("", digest) for digest in digests], hashes)
    seen.forget(gone, before=math.inf)
    seen.check_integrity()
    left = {digest for digests, _ in requests for digest in digests} - gone
    assert len(seen) == len(left)

    def is_of_others(one: str) -> bool:
        uses = [{*digests} for digests, hashes in requests if one in hashes]
        return bool(set.intersection(*uses)) and any(map(gone.isdisjoint, uses))

    for digest in left:
        kept = {
            one
            for digests, hashes in requests
            if digest in digests
            for one in hashes
            if gone.isdisjoint(digests) or is_of_others(one)
        }
        assert seen.hashes_of([digest]) == kept
    assert not seen.hashes_of(gone)


def test_an_item_is_ascribed_to_a_file_where_only_one_can_be_it() -> None:
    seen = SeenMedia()
    video, sound = (
        MediaItem(modality, f"http://a/{n}", digest=DIGESTS[n])
        for n, modality in enumerate(("video", "audio"))
    )
    picture = ImageItem("http://a/2", DIGESTS[2])
    seen.note_all([video], [], ["own"])
    seen.note_all([video, sound], [picture], ["own", "shared"])
    for name, modality, digest in (
        ("own", "audio", DIGESTS[0]),
        ("shared", "audio", DIGESTS[1]),
        ("shared", "image", DIGESTS[2]),
    ):
        medium = seen.medium_of(name, modality)
        assert medium is not None
        assert medium.digest == digest
    seen.note_all([sound], [ImageItem("http://a/3", DIGESTS[3])], ["two sounds"])
    seen.note_all([MediaItem("audio", "http://a/4", digest=DIGESTS[4])], [], ["two sounds"])
    assert seen.medium_of("two sounds", "audio") is None
    assert seen.medium_of("other", "video") is None


def test_requests_tell_of_which_files_an_item_may_have_been_made() -> None:
    seen = SeenMedia()
    for digests, hashes in (
        (DIGESTS[:1], ["own", "named anew"]),
        (DIGESTS[:2], ["own", "either", "other", "named twice"]),
        (DIGESTS[1:3], ["other"]),
        (DIGESTS[2:3], ["named anew"]),
        # The client gave it to one of the first two files before.
        (DIGESTS[3:4], ["named twice"]),
    ):
        seen.note_all([], [ImageItem("", digest) for digest in digests], hashes)
    asked = ["own", "named anew", "either", "other", "named twice", "unknown"]
    assert seen.made_of(DIGESTS[:1], asked) == {
        "own": ({*DIGESTS[:1]}, False),
        "named anew": (set(), True),
        "either": ({*DIGESTS[:2]}, False),
        "other": ({*DIGESTS[1:2]}, True),
        "named twice": (set(), True),
    }
    assert seen.made_of(DIGESTS[:3], ["other"]) == {"other": ({*DIGESTS[1:2]}, False)}


def test_an_item_of_a_file_that_was_forgotten_is_not_ascribed_to_the_file_beside_it() -> None:
    seen = SeenMedia()
    first, second, third = ([ImageItem("", digest)] for digest in DIGESTS[:3])
    seen.note_all([], first + second, ["of the first", "of the second"])
    seen.note_all([], second, ["of the second"])
    seen.forget(DIGESTS[:1], before=math.inf)
    asked = ["of the first", "of the second"]
    assert seen.made_of((), asked) == {"of the second": ({DIGESTS[1]}, True)}
    seen.note_all([], first + third, ["of the first", "of the third"])
    seen.note_all([], first + second, asked)
    assert seen.made_of((), asked) == {
        "of the first": ({DIGESTS[0]}, True),
        "of the second": ({DIGESTS[1]}, True),
    }


def test_a_file_that_came_again_is_not_forgotten() -> None:
    seen = SeenMedia()
    for digest in DIGESTS[:2]:
        seen.note(digest, "video", "", ["old"])
    before = time.monotonic()
    seen.note(DIGESTS[0], "video", "", ["new"])
    seen.forget(DIGESTS, before)
    assert seen.hashes_of(DIGESTS[:1]) == {"old", "new"}
    assert len(seen) == 1


def test_all_files_of_a_conversation_are_known_by_what_is_known_of_them() -> None:
    seen = SeenMedia()
    urls = ["http://a/1", "http://a/2", "http://a/3"]
    items = [MediaItem("video", urls[0], digest=DIGESTS[0]), MediaItem("audio", urls[1])]
    seen.note_all(items, [ImageItem(urls[2], DIGESTS[1])], ["h"])
    assert [seen.digests_at(url) for url in urls] == [
        {DIGESTS[0]},
        {unknown_digest(urls[1])},
        {DIGESTS[1]},
    ]
    assert all(seen.hashes_of(seen.digests_at(url)) == {"h"} for url in urls)


def test_a_file_whose_content_is_not_known_is_found_by_its_url() -> None:
    seen = SeenMedia()
    url = "http://a/picture.gif"
    seen.note(unknown_digest(url), "audio", url, ["h"])
    assert seen.hashes_of(seen.digests_at(url)) == {"h"}
