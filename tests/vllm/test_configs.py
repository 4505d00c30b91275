"""Every shipped --config file is one vLLM and the plugin accept."""

from pathlib import Path

import pytest
import yaml

from vllm_mm_ext.config.root import MMExtConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_vllm_and_the_plugin_accept_the_config_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Offline, vLLM looks for the model's files while it parses; only the arguments matter here.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # The module has moved between vLLM 0.32 and 0.33.
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ModuleNotFoundError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--config", str(path)])
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = MMExtConfig.from_additional_config(engine_args.additional_config)

    raw = yaml.safe_load(path.read_text())
    assert "mm_ext" in raw["additional-config"]
    assert (
        config.media.sampling.policy
        == raw["additional-config"]["mm_ext"]["media"]["sampling"]["policy"]
    )
    assert engine_args.max_num_batched_tokens == raw["max-num-batched-tokens"]
    assert engine_args.limit_mm_per_prompt["video"] >= 1
