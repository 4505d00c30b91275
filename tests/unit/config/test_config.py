"""The configuration accepts what is documented and refuses everything else by name."""

from pathlib import Path

import pytest

from vllm_mm_ext.config.root import ConfigError, MMExtConfig, to_markdown

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
            {"scheduler": {"encoder_tokens_idle": 100, "encoder_tokens_decoding": 200}},
            ["mm_ext.scheduler", "encoder_tokens_idle", "encoder_tokens_decoding (200)", "100"],
        ),
        (
            {"kv": {"max_visual_cache_gb": 2, "max_visual_cache_share": 0.5}},
            ["mm_ext.kv", "max_visual_cache_gb", "max_visual_cache_share", "2", "0.5"],
        ),
        ({"media": {"audio": {"overflow": 3}}}, ["overflow", "3", "'error'", "'truncate'"]),
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
