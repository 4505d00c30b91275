"""Every shipped --config file is one vLLM and the plugin accept."""

import argparse
from pathlib import Path

import pytest
import yaml

import vllm_mm_ext
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.tools.calibration.calibrating import Model, Setting, server_arguments

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
COMPOSER = Path(vllm_mm_ext.__file__).parent / "assets" / "composer-tiny" / "serve.yaml"
TINY = Path(__file__).parents[2] / "configs" / "tiny-cpu.yaml"


def test_configs_are_shipped_for_the_promised_models() -> None:
    names = {path.name.split(".yaml")[0] for path in CONFIGS}
    assert names >= {
        "qwen2.5-omni-7b.h100",
        "qwen3-omni-30b-a3b.h100",
        "qwen2.5-vl-7b.h100",
        "qwen3-vl-8b.h100",
        "llava-onevision-7b.h100",
        "tiny-cpu",
    }


def parsed(*arguments: str) -> argparse.Namespace:
    """What vLLM takes arguments of ``vllm serve`` for."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # The module has moved between vLLM 0.32 and 0.33.
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ModuleNotFoundError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    found: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([*arguments])
    return found


@pytest.mark.parametrize("path", [*CONFIGS, COMPOSER], ids=lambda path: path.name)
def test_vllm_and_the_plugin_accept_the_config_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Offline, vLLM looks for the model's files while it parses; only the arguments matter here.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    from vllm.engine.arg_utils import AsyncEngineArgs

    engine_args = AsyncEngineArgs.from_cli_args(parsed("--config", str(path)))
    config = MMExtConfig.from_additional_config(engine_args.additional_config)

    raw = yaml.safe_load(path.read_text())
    assert "mm_ext" in raw["additional-config"]
    assert (
        config.media.sampling.policy
        == raw["additional-config"]["mm_ext"]["media"]["sampling"]["policy"]
    )
    assert engine_args.max_num_batched_tokens == raw["max-num-batched-tokens"]
    assert engine_args.limit_mm_per_prompt["video"] >= 1


@pytest.mark.parametrize("path", [COMPOSER, TINY], ids=lambda path: path.name)
def test_a_small_config_says_how_large_the_kv_cache_is_and_the_command_line_wins(
    path: Path,
) -> None:
    """On a CPU vLLM would else take nearly all memory, or not start."""
    assert parsed("--config", str(path)).kv_cache_memory_bytes == 1 << 30
    asked = parsed("--config", str(path), "--kv-cache-memory-bytes", "2G")
    assert asked.kv_cache_memory_bytes == 2 << 30


def test_a_plan_of_several_replicas_is_calibrated_on_one(tmp_path: Path) -> None:
    planned = yaml.safe_load(CONFIGS[0].read_text()) | {"data-parallel-size": 4}
    config = tmp_path / "plan.yaml"
    config.write_text(yaml.safe_dump(planned))
    setting = Setting.of(config)
    args = parsed(*server_arguments(Model(str(checkpoint("qwen2_5_omni")), setting), setting))
    assert (args.data_parallel_size, args.api_server_count) == (1, 1)
    assert args.max_num_seqs == planned["max-num-seqs"]


def test_what_a_plan_does_not_serve_is_not_calibrated(tmp_path: Path) -> None:
    planned = yaml.safe_load(CONFIGS[0].read_text())
    planned["limit-mm-per-prompt"] = {"video": 1, "image": 0}
    config = tmp_path / "plan.yaml"
    config.write_text(yaml.safe_dump(planned))
    setting = Setting.of(config)
    args = parsed(*server_arguments(Model(str(checkpoint("qwen2_5_omni")), setting), setting))
    assert args.limit_mm_per_prompt == {"audio": 0, "image": 0, "video": 4}
