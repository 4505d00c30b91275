"""What `vllm-mm doctor` says of the parts that the command line names."""

from __future__ import annotations

import pytest

from vllm_mm_ext.adapters.names import encoder_cache_names as vllm_names_encoder_cache
from vllm_mm_ext.adapters.scheduler import choice
from vllm_mm_ext.adapters.vllm_compat import VllmName
from vllm_mm_ext.tools.cli.doctor import check_engine_parts


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
