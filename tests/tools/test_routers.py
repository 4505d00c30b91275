"""Real routers for studies and tests: what they lack is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mm_ext.testing import routers


def test_a_router_that_cannot_start_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "`envoy` on the PATH" in str(routers.missing("envoy"))
    (tmp_path / "envoy").write_text("#!/bin/sh\n")
    (tmp_path / "envoy").chmod(0o755)
    assert routers.missing("envoy") is None
    # As in an installed package.
    monkeypatch.setattr(routers, "CONFIGS", tmp_path / "configs")
    reason = str(routers.missing("envoy"))
    assert "configurations" in reason
    assert "PATH" not in reason
