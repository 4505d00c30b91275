"""Whatever is turned off, greedy answers stay those of stock vLLM."""

from __future__ import annotations

import pytest
from engine_script import run_script
from features_engine import make_media, variants

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """Tokens by what was off; one process without the plugin, one for all else."""
    media = tmp_path_factory.mktemp("features")
    make_media(media)
    found: dict[str, list[list[int]]] = {}
    for mode in ("stock", "plugin"):
        found |= run_script("features_engine.py", mode, media, timeout_s=500)
    return found


@pytest.mark.parametrize("off", variants())
def test_answers_are_those_of_stock_whatever_is_off(
    outcomes: dict[str, list[list[int]]], off: str
) -> None:
    assert outcomes[off] == outcomes["plugin"]


def test_answers_depend_on_what_was_asked(outcomes: dict[str, list[list[int]]]) -> None:
    assert len({tuple(tokens) for tokens in outcomes["plugin"]}) == len(outcomes["plugin"])
