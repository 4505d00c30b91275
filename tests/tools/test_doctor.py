"""What `vllm-mm doctor` says of the parts that the command line names."""

from __future__ import annotations

import importlib.metadata as md
import subprocess
from typing import Any

import pytest
from typer.testing import CliRunner
from vllm.multimodal.media import MediaConnector
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from vllm_mm_ext.adapters.media import request_budgets
from vllm_mm_ext.adapters.names import encoder_cache_names as vllm_names_encoder_cache
from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.scheduler import choice
from vllm_mm_ext.adapters.vllm_compat import UNNAMED
from vllm_mm_ext.tools.cli import doctor as doctor_module
from vllm_mm_ext.tools.cli.doctor import (
    check_bounds,
    check_engine_parts,
    check_features,
    check_gpu_decoding,
    check_registration,
)
from vllm_mm_ext.tools.cli.main import app


def test_the_engines_parts_fit_the_installed_vllm() -> None:
    findings = check_engine_parts()
    assert [finding.name for finding in findings if not finding.ok] == []
    assert {"scheduler", "encoder cache, device tier"} <= {finding.name for finding in findings}


def test_a_part_that_vllm_changed_underneath_is_named_with_what_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = VllmName("vllm.v1.core.sched.scheduler:Scheduler.gone")
    monkeypatch.setattr(choice, "SCHEDULER_NAMES", (gone,))
    monkeypatch.setattr(vllm_names_encoder_cache, "HOST_TIER_NAMES", (gone,))
    off = {finding.name: finding.detail for finding in check_engine_parts() if not finding.ok}
    assert set(off) == {"scheduler", "encoder cache, host tier"}
    assert all("gone" in detail for detail in off.values())
    assert "videos stall text" in off["scheduler"]


def test_a_parameter_that_an_override_does_not_take_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def allocate(self: object, request: object, input_id: int, later: int = 0) -> None:
        """As a later vLLM may have it."""

    monkeypatch.setattr(EncoderCacheManager, "allocate", allocate)
    off = {finding.name: finding.detail for finding in check_engine_parts() if not finding.ok}
    assert off == {
        "overrides of MMExtEncoderCacheManager": "EncoderCacheManager.allocate takes later now"
    }


def test_a_limit_that_the_plugin_does_not_know_turns_its_connector_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(
        self: object,
        media_io_kwargs: object = None,
        connection: object = None,
        *,
        allowed_local_media_path: str = "",
        allowed_media_domains: object = None,
        pixel_budget: object = None,
    ) -> None:
        """As a later vLLM may have it."""

    monkeypatch.setattr(MediaConnector, "__init__", init)
    off, *others = [finding for finding in check_features() if not finding.ok]
    # Windows of a long video are read through the connector.
    assert [finding.name for finding in others] == ["long video"]
    assert off.name == "media connector"
    assert "takes pixel_budget now, which the plugin does not know" in off.detail


def test_budgets_that_are_not_charged_turn_the_connector_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    media = pytest.importorskip("vllm.multimodal.media")
    if not hasattr(media, "MediaDecodedBudget"):
        pytest.skip("this vLLM has no budgets for a request's media")
    monkeypatch.setattr(request_budgets, "charge_request", lambda *_: None)
    off, *others = [finding for finding in check_features() if not finding.ok]
    assert others == []
    assert off.name == "media connector"
    assert "budgets" in off.detail


def test_versions_outside_their_bounds_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_bounds() == []
    known = md.version
    monkeypatch.setattr(
        md, "version", lambda name: "5.24.0" if name == "transformers" else known(name)
    )
    details = [finding.detail for finding in check_bounds()]
    assert details
    assert all("5.24.0 is outside" in detail for detail in details)


@pytest.mark.parametrize(
    ("value", "ok", "detail"),
    [
        (None, True, UNNAMED),
        ("other,mm_ext", True, "'other,mm_ext'"),
        ("", False, "'' does not name mm_ext: the plugin is off"),
    ],
)
def test_what_vllm_loads_of_the_plugin_is_told(
    value: str | None, ok: bool, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    (found,) = (one for one in check_registration() if one.name == "VLLM_PLUGINS")
    assert (found.ok, found.detail) == (ok, detail)


def test_the_changes_to_vllm_can_be_listed() -> None:
    done = CliRunner().invoke(app, ["doctor", "--patches"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "planning (vLLM >=0.32, made)" in done.stdout
    assert "BaseRenderer.render_chat_async" in done.stdout
    assert "until  vLLM's configuration can name the class of the block pool" in done.stdout


def test_doctor_says_what_the_gpu_decodes_or_why_none_does() -> None:
    finding = check_gpu_decoding()
    assert not finding.fatal
    if finding.ok:
        assert "h264" in finding.detail
    else:
        assert finding.detail.startswith("the CPU decodes: ")
        assert "driver" in finding.detail or "GPU" in finding.detail


def test_a_probe_of_the_gpu_that_dies_or_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    program = subprocess.run
    for command, said in {"exit 139": "status 139", "sleep 9": "within 1 s"}.items():

        def run(_: list[str], command: str = command, **options: Any) -> Any:
            return program(["sh", "-c", command], **options)

        monkeypatch.setattr(doctor_module, "_GPU_TIMEOUT_S", 1)
        monkeypatch.setattr(doctor_module.subprocess, "run", run)
        finding = check_gpu_decoding()
        monkeypatch.undo()
        assert said in finding.detail
