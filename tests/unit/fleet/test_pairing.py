"""Servers with different plans do not share encoder outputs, and say what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.fleet.encoder_choice import DOWN_S, EncoderChoice
from vllm_mm_ext.fleet.model_identity import model_identity
from vllm_mm_ext.fleet.pairing import MANIFEST, PairingError, as_header, differing_parts, join

PLAN = {"model": "content 12", "media.sampling": {"fps": 1.0}, "sizes": (1, 2)}
names = st.text("abc.", min_size=1, max_size=4)
plans = st.dictionaries(names, st.one_of(st.integers(), st.text(max_size=8), st.none()), max_size=5)


def test_equal_plans_pair_and_others_are_told_what_differs(tmp_path: Path) -> None:
    store = tmp_path / "deep" / "store"
    join(store, PLAN)
    join(store, dict(PLAN))
    with pytest.raises(PairingError, match=r'sampling: \{"fps": 2.0\} here, \{"fps": 1.0\} there'):
        join(store, {**PLAN, "media.sampling": {"fps": 2.0}})
    assert [path.name for path in store.iterdir()] == [MANIFEST]


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{"):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(PairingError, match="not a plan"):
            join(tmp_path, PLAN)


@given(plans, plans)
def test_a_header_tells_exactly_which_parts_differ(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    expected = sorted(
        name
        for name in {*one, *other}
        if (name in one) != (name in other) or one[name] != other[name]
    )
    assert differing_parts(one, as_header(other)) == expected
    assert as_header(one).isascii()


def checkpoint(directory: Path, weights: bytes = bytes(300_000)) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "x"}')
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def test_a_model_is_known_wherever_it_lies_and_another_training_is_another_model(
    tmp_path: Path,
) -> None:
    first = model_identity(checkpoint(tmp_path / "a"))
    assert first == model_identity(checkpoint(tmp_path / "b" / "c"))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert first == model_identity(tmp_path / "link")
    trained = model_identity(checkpoint(tmp_path / "d", bytes(299_999) + b"1"))
    assert trained != first
    commit = checkpoint(tmp_path / "snapshots" / ("0" * 40))
    assert model_identity(commit) == f"commit {'0' * 40}"


@given(st.lists(st.sampled_from("abcd"), min_size=1, unique=True), st.text())
def test_the_same_encoder_is_asked_until_it_fails_and_again_when_it_is_back(
    encoders: list[str], key: str
) -> None:
    now = [0.0]
    choice = EncoderChoice(encoders, lambda: now[0])
    first, *rest = choice.candidates(key)
    choice.failed(first)
    assert choice.candidates(key) == rest
    now[0] += DOWN_S
    assert choice.candidates(key) == [first, *rest]
