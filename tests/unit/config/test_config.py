"""The configuration accepts what is documented and refuses everything else by name."""

from pathlib import Path

import pytest
import yaml

from vllm_mm_ext.config.root import ConfigError, MMExtConfig, near_misses, to_markdown

ROOT = Path(__file__).parents[3]


def read(settings: object) -> MMExtConfig:
    return MMExtConfig.from_additional_config({"mm_ext": settings})


def test_absent_settings_mean_defaults() -> None:
    assert MMExtConfig.from_additional_config({}) == MMExtConfig()
    assert MMExtConfig.from_additional_config(object()) == MMExtConfig()
    assert read({}) == MMExtConfig()


def test_other_plugins_settings_are_not_ours_to_judge() -> None:
    assert MMExtConfig.from_additional_config({"other": {"x": 1}}) == MMExtConfig()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mdia": {}}, ["mm_ext.mdia", "{}", "unknown key", "media"]),
        (
            {"media": {"sampling": {"policy": "fancy"}}},
            ["mm_ext.media.sampling.policy", "'fancy'", "'adaptive'", "'stock'"],
        ),
        (
            {"media": {"sampling": {"fps": -1}}},
            ["mm_ext.media.sampling.fps", "-1", "> 0", "<= 60"],
        ),
        (
            {"media": {"cache": {"decoded_gb": 4}}},
            ["mm_ext.media.cache.decoded_gb", "4", "unknown key", "decoded_mb"],
        ),
        (
            {"media": {"sampling": {"min_frames": 64}}},
            ["mm_ext.media.sampling", "min_frames (64)", "max_frames (32)"],
        ),
        (
            {"scheduler": {"target_itl_ms": 0}},
            ["mm_ext.scheduler.target_itl_ms", "0", "> 0", "<= 60000"],
        ),
        (
            {"kv": {"max_visual_cache_gb": 2, "max_visual_cache_share": 0.5}},
            ["mm_ext.kv", "max_visual_cache_gb", "max_visual_cache_share", "2", "0.5"],
        ),
        ({"media": {"audio": {"overflow": 3}}}, ["overflow", "3", "'error'", "'truncate'"]),
        (
            {"quality": {"budget": {"reductions": [{"pool": 2}, {"pools": 2}]}}},
            ["mm_ext.quality.budget.reductions.1.pools", "valid keys here: pool, temporal"],
        ),
        (
            {"quality": {"budget": {"reductions": [{"pool": 9}]}}},
            ["mm_ext.quality.budget.reductions.0.pool", "9", "<= 8"],
        ),
        ({"quality": {"tiers": {"kv": ["x", 0.9]}}}, ["mm_ext.quality.tiers.kv.0", "'x'"]),
        (
            {"quality": {"tiers": {"kv": [float("nan"), 0.9]}}},
            ["mm_ext.quality.tiers.kv.0", "nan", "finite"],
        ),
        ("media", ["must be a mapping", "'media'"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_valid(
    settings: object, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        read(settings)
    for word in words:
        assert word in str(error.value)


def test_every_wrong_setting_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        read({"media": {"resize": "x", "sampling": {"fps": 0}, "nope": 1}})
    message = str(error.value)
    assert "mm_ext.media.resize" in message
    assert "mm_ext.media.sampling.fps" in message
    assert "mm_ext.media.nope" in message


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == to_markdown(), "run: vllm-mm config --markdown > docs/configuration.md"


def test_words_that_yaml_reads_as_booleans_are_taken_as_words() -> None:
    raw = yaml.safe_load("{media: {audio: {in_video: off}, enabled: off}}")
    media = MMExtConfig.from_additional_config({"mm_ext": raw}).media
    assert (media.audio.in_video, media.enabled) == ("off", False)
    with pytest.raises(ConfigError, match=r"in_video = True: .*'auto' \| 'off'"):
        MMExtConfig.from_additional_config({"mm_ext": {"media": {"audio": {"in_video": True}}}})


@pytest.mark.parametrize(
    "key", ["mm-ext", "mmext", "MM_EXT", "mm_ext.media.resize", "vllm_mm_ext", "mm_ext "]
)
def test_keys_that_look_like_ours_are_found(key: str) -> None:
    assert near_misses({key: {}, "mm_ext": {}, "other": {}}) == [key]


def test_nothing_looks_like_ours_where_nothing_does() -> None:
    assert near_misses({"mm_ext": {"mm-ext": 1}, "mm": {}, "ext": {}}) == []
    assert near_misses(None) == []
