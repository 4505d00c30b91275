"""The KV events of an engine with the plugin's pool tell where which mm item is cached."""

from __future__ import annotations

from kv_events import Knowledge, in_pool
from kv_harness import BLOCK, Engine, Media, Text, request

VIDEO = (Text(0, 6), Media("a.0", 9), Media("a.1", 12), Text(1, 5))


def test_each_block_names_the_segments_it_holds_and_where_they_begin() -> None:
    engine = Engine(64, events=True)
    engine.serve(request("first", VIDEO, salt="tenant"))
    (stored,) = engine.told()
    assert stored["block_size"] == BLOCK
    assert stored["parent_block_hash"] is None
    # Of each block: the salt (of the first alone), and each item with its place in the block.
    assert [[list(key) if isinstance(key, tuple) else key for key in keys or ()]
            for keys in stored["extra_keys"]] == [
        ["tenant"],
        [["a.0", 2]],
        [["a.0", -2]],
        [["a.0", -6], ["a.1", 3]],
        [["a.1", -1]],
        [["a.1", -5]],
        [["a.1", -9]],
        [],
    ]  # fmt: skip


def test_what_is_found_again_is_not_told_again_and_what_comes_after_names_it() -> None:
    engine, known = Engine(64, events=True), Knowledge()
    engine.serve(request("first", VIDEO))
    known.read(engine.told())
    assert known.places() == {("a.0", 6), ("a.1", 15)}
    before = known.cached()
    engine.serve(request("second", (*VIDEO, Media("b", 8), Text(2, 4))))
    known.read(engine.told())
    assert known.places() == {("a.0", 6), ("a.1", 15), ("b", 32)}
    assert all(count == 1 for count in known.cached().values())
    assert before.keys() < known.cached().keys()


def test_blocks_are_told_to_be_gone_when_others_take_them_and_not_before() -> None:
    engine, known = Engine(32, events=True), Knowledge()
    engine.serve(request("video", VIDEO))
    known.read(engine.told())
    # The pool gives the video up, and requests still find it.
    engine.pool.let_go([piece for piece in engine.pool.tree if piece.parent is None])
    assert engine.told() == []
    assert engine.serve(request("again", VIDEO)) > 0
    engine.serve(request("all", [Text(5, 31 * BLOCK - 3)]))
    known.read(engine.told())
    assert known.places() == set()
    assert known.cached() == in_pool(engine.pool)


def test_a_takedown_is_told() -> None:
    engine, known = Engine(64, events=True), Knowledge()
    engine.serve(request("video", VIDEO))
    engine.pool.take_down(lambda one: one == "a.1")
    known.read(engine.told())
    # The block in which the second segment begins has gone, with the end of the first.
    assert known.places() == {("a.0", 6)}
    assert engine.manager.reset_prefix_cache()
    known.read(engine.told())
    assert known.cleared == 1
    assert not known.cached()
