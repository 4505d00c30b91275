"""A transport of encoder outputs at start-up: what is built and refused, how items are named."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from encoder_cache_harness import WIDTH, engine_config
from omni_reference import even, make_processor, pixels, render, sound, video
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.engine.arg_utils import EngineArgs

from vllm_mm_ext.adapters.encoder_cache import shared_names
from vllm_mm_ext.adapters.encoder_cache.ec_connector import MMExtECConnector
from vllm_mm_ext.adapters.encoder_cache.instance_plan import made_plan
from vllm_mm_ext.adapters.encoder_cache.startup import HostTierError, check_encode_only
from vllm_mm_ext.adapters.encoder_cache.transport_connector import TransportConnector
from vllm_mm_ext.adapters.encoder_cache.transport_options import TransportError, is_shared
from vllm_mm_ext.adapters.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration as Model
from vllm_mm_ext.fleet.pairing import PairingError
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import sharing

ROLES = pytest.mark.parametrize("role", list(ECConnectorRole))
VIDEO = "<|vision_bos|><|VIDEO|><|vision_eos|>"


@pytest.fixture
def config(tmp_path: Path) -> Any:
    found = copy.deepcopy(engine_config())
    found.ec_transfer_config.mm_encoder_output_widths = {"video": WIDTH}
    found.ec_transfer_config.ec_connector_extra_config = {
        "transport": "ECExampleConnector",
        "shared_storage_path": str(tmp_path / "store"),
    }
    found.model_config.mm_ext_plan = made_plan(found)
    return found


@ROLES
@pytest.mark.parametrize("ec_role", ["ec_producer", "ec_consumer", "ec_both"])
def test_each_role_has_both_tiers_and_the_transport(config: Any, role: Any, ec_role: str) -> None:
    config.ec_transfer_config.ec_role = ec_role
    made: Any = MMExtECConnector(config, role)
    assert type(made) is TransportConnector
    assert type(made.transport).__name__ == "SharedStoreConnector"
    made.shutdown()


@ROLES
def test_without_a_transport_outputs_are_the_engines_own(config: Any, role: Any) -> None:
    config.ec_transfer_config.ec_connector_extra_config = {}
    assert type(MMExtECConnector(config, role)) is MMExtECConnector
    config.ec_transfer_config.ec_role = "ec_producer"
    with pytest.raises(HostTierError, match=r"ec_connector_extra_config\.transport"):
        MMExtECConnector(config, role)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transport": "NoSuch"}, r"must be one of ECExampleConnector, .* got 'NoSuch'"),
        ({"shared_storage_path": "relative"}, r"absolute path .* got 'relative'"),
        ({"shared_storage_gb": 0}, "number above 0, got 0"),
        ({"shared_storage_gb": "16"}, "number above 0, got '16'"),
        ({"shared_path": "/tmp"}, "unknown keys: shared_path"),
        ({"transport": "ECCPUConnector"}, "second model runner"),
    ],
)
def test_what_cannot_work_is_refused_with_what_could(
    config: Any, changed: dict[str, Any], message: str
) -> None:
    config.ec_transfer_config.ec_connector_extra_config.update(changed)
    with pytest.raises(TransportError, match=message):
        MMExtECConnector(config, ECConnectorRole.WORKER)


def test_encoders_are_asked_by_who_reads_what_they_write(config: Any) -> None:
    config.additional_config = {"mm_ext": {"encoder_cache": {"encoders": ["http://host:1"]}}}
    for role in ("ec_consumer", "ec_both"):
        config.ec_transfer_config.ec_role = role
        MMExtECConnector(config, ECConnectorRole.WORKER)
    config.ec_transfer_config.ec_role = "ec_producer"
    with pytest.raises(
        TransportError, match="ec_consumer or ec_both, got ECExampleConnector and ec_p"
    ):
        MMExtECConnector(config, ECConnectorRole.WORKER)


def test_an_encoder_takes_a_prompt_in_one_step(config: Any) -> None:
    assert config.scheduler_config.max_num_batched_tokens < config.model_config.max_model_len
    check_encode_only(config)
    config.ec_transfer_config.ec_role = "ec_producer"
    with pytest.raises(TransportError, match=r"--max-num-batched-tokens \(1024\) .* \(8192\)"):
        check_encode_only(config)
    config.scheduler_config.max_num_batched_tokens = 8192
    check_encode_only(config)


@ROLES
def test_instances_with_other_plans_do_not_share(config: Any, role: Any) -> None:
    MMExtECConnector(config, role)
    config.additional_config = {"mm_ext": {"media": {"sampling": {"fps": 4.0}}}}
    config.model_config.mm_ext_plan = made_plan(config)
    with pytest.raises(PairingError, match=r"media\.sampling"):
        MMExtECConnector(config, role)
    # What does not decide what segments are may differ.
    config.additional_config = {
        "mm_ext": {"encoder_cache": {"host_mb": 1}, "kv": {"enabled": False}}
    }
    config.model_config.mm_ext_plan = made_plan(config)
    MMExtECConnector(config, role)


def test_a_server_with_another_plan_does_not_begin_to_load_a_model(tmp_path: Path) -> None:
    shared_names.install()

    def start(role: str, **settings: Any) -> Any:
        return EngineArgs(
            model=str(checkpoint("qwen2_5_vl")),
            enforce_eager=True,
            max_model_len=512,
            max_num_batched_tokens=512,
            max_num_seqs=4,
            additional_config={"mm_ext": settings},
            **sharing(role, tmp_path),
        ).create_engine_config()

    start("ec_producer")
    config = start("ec_consumer")
    assert not config.model_config.multimodal_config.allow_missing_mm_embeddings
    with pytest.raises(PairingError, match=r'segments: \{"tokens": 128\} here'):
        start("ec_consumer", segments={"tokens": 128})


def test_without_the_plugins_names_nothing_is_shared(config: Any) -> None:
    config.model_config.mm_ext_plan = None
    with pytest.raises(TransportError, match="VLLM_PLUGINS"):
        MMExtECConnector(config, ECConnectorRole.WORKER)


def own_processor() -> Any:
    """A processor whose configuration no other test shares."""
    processor = make_processor("qwen2_5_omni", Model)
    context = processor.info.ctx
    own = copy.copy(context.model_config)
    processor.info.ctx = dataclasses.replace(context, model_config=own)
    return processor


def test_items_have_the_same_names_wherever_the_model_is(tmp_path: Path) -> None:
    shared_names.install()
    here, there = (own_processor() for _ in range(2))
    (tmp_path / "link").symlink_to(checkpoint("qwen2_5_omni"))
    there.info.ctx.model_config.model = str(tmp_path / "link")
    data = {"video": [video(pixels(8), even(8, 2.0), sound(4.0))]}

    def named(processor: Any) -> Any:
        return render(processor, VIDEO, data)["mm_hashes"]

    # As in stock vLLM, which the plugin leaves as it is where nothing is shared.
    assert named(here) != named(there)
    for processor in (here, there):
        processor.info.ctx.model_config.mm_ext_plan = {"model": "one"}
    first = named(here)
    assert first == named(there)
    there.info.ctx.model_config.mm_ext_plan = {"model": "other"}
    assert not set(first["video"]) & set(named(there)["video"])


def test_what_a_client_calls_media_is_no_name_that_instances_share() -> None:
    assert shared_names.mapped("../../etc", "plan") != shared_names.mapped("../../etc", "other")
    assert shared_names.mapped("a", "plan") == shared_names.mapped("a", "plan")
    assert shared_names.mapped("\ud800/..", "plan").isalnum()


def test_only_names_that_tell_what_is_in_an_item_are_shared() -> None:
    shared_names.install()
    processor = own_processor()
    processor.info.ctx.model_config.mm_ext_plan = {"model": "one"}
    data = {
        "video": [video(pixels(8), even(8, 2.0), sound(4.0))],
        "audio": [sound(2.0), sound(3.0)],
    }
    prompt = VIDEO + 2 * "<|audio_bos|><|AUDIO|><|audio_eos|>"
    uuids = {"video": ["a"], "audio": ["b", None]}
    found = render(processor, prompt, data, uuids)["mm_hashes"]
    assert all(is_shared(name) for name in found["video"])
    assert [is_shared(name) for name in found["audio"]][:2] == [False, True]
    assert all(is_shared(name) for name in found["audio"][2:])


def test_the_plan_has_what_changes_outputs_and_not_where_they_are_made(
    config: Any, tmp_path: Path
) -> None:
    config.model_config = copy.deepcopy(config.model_config)
    media, before = config.model_config.multimodal_config, made_plan(config)
    # As vLLM does for an encoder on a GPU.
    media.mm_processor_kwargs = {"device": "cuda"}
    media.media_io_kwargs = {"video": {"backend": "torchcodec", "device": "cuda"}}
    assert made_plan(config) == before
    (tmp_path / "scales").write_text("{}")
    media.mm_encoder_attn_dtype = "fp8"
    media.mm_encoder_fp8_scale_path = str(tmp_path / "scales")
    config.model_config.hf_overrides = {"vision_config": {"depth": 1}}
    found = made_plan(config)
    differ = {key for key in found if found[key] != before[key]}
    assert differ == {"hf_overrides", "mm_encoder_attn_dtype", "mm_encoder_fp8_scales"}


@pytest.mark.parametrize(
    ("quality", "part"),
    [
        ({"tiers": {"resolution": [448, 336, 112]}}, "quality.tiers.resolution"),
        ({"tiers": {"frame_rate": [1.0, 0.5, 0.5]}}, "quality.tiers.frame_rate"),
        ({"bounds": {"max_total_tokens": 1000}}, "quality.bounds.max_total_tokens"),
        ({"tiers": {"hold_s": 1.0}, "bounds": {"max_fps": 4.0}}, None),
    ],
)
def test_the_plan_has_what_decides_the_size_of_a_video(
    config: Any, quality: dict[str, Any], part: str | None
) -> None:
    other = copy.copy(config)
    other.additional_config = {"mm_ext": {"quality": quality}}
    config = copy.copy(config)
    config.additional_config = {}
    found, before = made_plan(other), made_plan(config)
    assert {key for key in found if found[key] != before[key]} == ({part} if part else set())
