"""Whatever is turned off, greedy answers stay those of stock vLLM, and nothing else is off."""

from __future__ import annotations

from typing import Any

import pytest
from engine_script import run_script
from features_engine import FILES, MAX_PATCHES, make_media, unloaded_variants, variants

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = "Qwen2_5_VLForConditionalGeneration"
PROCESSOR = "Qwen2_5_VLMultiModalProcessor"
STOCK_PARTS = {
    "scheduler": "vllm.Scheduler",
    "KV blocks": "vllm.BlockPool",
    "encoder cache": "vllm.EncoderCacheManager",
    "host tier": "builtins.NoneType",
    "model": f"vllm.{MODEL}",
    "processor": f"vllm.{PROCESSOR}",
}
PLUGIN_PARTS = {
    "scheduler": "vllm_mm_ext.MMExtScheduler",
    "KV blocks": "vllm_mm_ext.MMExtBlockPool",
    "encoder cache": "vllm_mm_ext.MMExtEncoderCacheManager",
    "host tier": "vllm_mm_ext.MMExtECConnector",
    "model": f"vllm_mm_ext.{MODEL}",
    "processor": f"vllm_mm_ext.{PROCESSOR}",
}
EVERYTHING = {*PLUGIN_PARTS, "front-end", "segments", "encoder batches", "quality"}
# What is stock's by what was turned off: that alone, but for these.
STOCKS: dict[str, set[str]] = {name: {name} for name in variants()} | {
    "nothing": set(),
    # The host tier works beside the device tier only.
    "encoder cache": {"encoder cache", "host tier"},
    "plugin": EVERYTHING,
    # Named by its path a class needs no entry point.
    "entry points": EVERYTHING - {"scheduler", "encoder cache"},
}
OFF = [*unloaded_variants(), *variants()]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each process found: one that does not load the plugin, and one that does."""
    media = tmp_path_factory.mktemp("features")
    make_media(media)
    return {
        mode: run_script("features_engine.py", mode, media, timeout_s=500)
        for mode in ("stock", "plugin")
    }


@pytest.fixture(scope="module")
def outcomes(reports: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each engine answered and did, by what was off."""
    return {**reports["stock"]["outcomes"], **reports["plugin"]["outcomes"]}


@pytest.mark.parametrize("off", OFF)
def test_answers_are_those_of_stock_whatever_is_off(
    outcomes: dict[str, dict[str, Any]], off: str
) -> None:
    assert outcomes[off]["tokens"] == outcomes["plugin"]["tokens"]


def test_answers_depend_on_what_was_asked(outcomes: dict[str, dict[str, Any]]) -> None:
    tokens = outcomes["plugin"]["tokens"]
    assert len({tuple(answer) for answer in tokens}) == len(tokens)


@pytest.mark.parametrize("off", OFF)
def test_what_is_off_is_stocks_and_all_else_the_plugins(
    outcomes: dict[str, dict[str, Any]], off: str
) -> None:
    found, stocks = outcomes[off], STOCKS[off]
    assert found["parts"] == {
        name: (STOCK_PARTS if name in stocks else PLUGIN_PARTS)[name] for name in PLUGIN_PARTS
    }
    *first, text = found["items"][: len(FILES) + 1]
    assert text == 0
    # The second turn has the same videos.
    assert found["items"][len(FILES) + 1 :] == first
    assert first == [1] * len(FILES) if "segments" in stocks else min(first) > 1
    assert (max(found["calls"]) > MAX_PATCHES) == ("encoder batches" in stocks)
    # In each of two turns.
    assert found["stock_loads"] == (2 * len(FILES) if "front-end" in stocks else 0)


@pytest.mark.parametrize("off", OFF)
def test_the_encoder_computes_no_more_and_no_less_than_in_stock(
    outcomes: dict[str, dict[str, Any]], off: str
) -> None:
    assert sum(outcomes[off]["calls"]) == sum(outcomes["plugin"]["calls"])


def test_videos_follow_load_only_where_quality_is_on(outcomes: dict[str, dict[str, Any]]) -> None:
    tiers = {off: found["tier"] for off, found in outcomes.items()}
    assert {tiers.pop(off) for off in ("plugin", "entry points")} == {None}
    assert tiers.pop("quality") == 0
    assert set(tiers.values()) == {2}


def test_the_host_tier_does_not_start_unless_the_plugin_is_loaded(reports: dict[str, Any]) -> None:
    refused = reports["stock"]["refusal"]
    assert refused.startswith("HostTierError")
    assert "VLLM_PLUGINS" in refused
