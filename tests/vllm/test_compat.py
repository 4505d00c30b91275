"""When a private vLLM name changes, its feature falls back to stock with one warning; no other."""

import inspect
import logging
import os
from dataclasses import replace
from typing import Any

import pytest
from packaging.version import Version

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.vllm_compat import Feature, IncompatibleError, VllmName, activate
from vllm_mm_ext.plugin import FEATURES, register

NEEDS = [(feature, name) for feature in FEATURES for name in feature.needs]
SIGNED = [(f, n) for f, n in NEEDS if n.params and n.params != ("self",)]


def owner_of(name: VllmName) -> tuple[Any, str]:
    module, _, path = name.path.partition(":")
    *parents, last = path.split(".")
    owner = VllmName(f"{module}:{'.'.join(parents)}").resolve() if parents else None
    return (owner if parents else __import__(module, fromlist=["_"])), last


def watched(feature: Feature) -> tuple[Feature, list[str]]:
    installed: list[str] = []
    return replace(feature, install=lambda: installed.append(feature.name)), installed


def test_every_feature_is_active_on_the_supported_vllm() -> None:
    assert vllm_compat.check_version() is None
    assert [status.reason for status in register() if not status.active] == []


def test_registering_twice_installs_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    first = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is first


@pytest.mark.parametrize(
    ("feature", "name"), NEEDS, ids=[f"{f.name}-{n.path.split(':')[1]}" for f, n in NEEDS]
)
def test_a_missing_name_turns_off_its_feature_with_one_warning(
    feature: Feature,
    name: VllmName,
    caplog: pytest.LogCaptureFixture,
) -> None:
    patched = replace(name, path=f"{name.path}_renamed")
    broken, installed = watched(
        replace(feature, needs=tuple(patched if n is name else n for n in feature.needs))
    )
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        (status,) = activate([broken])
    assert not status.active
    assert f"{name.path}_renamed" in status.reason
    assert installed == []
    assert len(caplog.records) == 1
    assert feature.name in caplog.text


@pytest.mark.parametrize(
    ("feature", "name"),
    SIGNED,
    ids=[f"{f.name}-{n.path.split(':')[1]}" for f, n in SIGNED],
)
def test_a_changed_signature_turns_off_its_feature_only(
    feature: Feature, name: VllmName, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(something_else: int) -> None:
        """A vLLM that takes other parameters."""

    owner, attribute = owner_of(name)
    if name.by_source:
        # As if the source had lost the parameter: ask for one it does not have.
        asked = replace(name, params=("something_else",))
        feature = replace(feature, needs=tuple(asked if n is name else n for n in feature.needs))
    elif inspect.isclass(getattr(owner, attribute)):
        monkeypatch.setattr(owner, attribute, type("Changed", (), {"__init__": changed}))
    else:
        monkeypatch.setattr(owner, attribute, changed)
    broken, installed = watched(feature)
    other, other_installed = watched(
        Feature("other", "nothing", (VllmName("vllm.plugins:load_general_plugins"),), lambda: None)
    )
    first, second = activate([broken, other])
    assert (first.active, second.active) == (False, True)
    assert installed == []
    assert other_installed == ["other"]


def test_a_feature_whose_installation_fails_does_not_stop_the_next() -> None:
    def fail() -> None:
        raise RuntimeError("no such luck")

    first, second = activate(
        [Feature("a", "loses a", (), fail), Feature("b", "loses b", (), lambda: None)]
    )
    assert (first.active, first.reason) == (False, "no such luck")
    assert second.active


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0"])
def test_versions_outside_the_range_are_named(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_compat, "vllm_version", lambda: Version(version))
    assert version in (vllm_compat.check_version() or "")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc1"])
def test_versions_inside_the_range_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_compat, "vllm_version", lambda: Version(version))
    assert vllm_compat.check_version() is None


def test_a_missing_module_is_an_incompatibility_not_a_crash() -> None:
    with pytest.raises(IncompatibleError, match="gone"):
        VllmName("vllm.gone:Thing").check()


def test_registering_leaves_the_environment_of_child_processes_alone() -> None:
    from vllm import envs

    register()
    assert vllm_compat.CONNECTOR_ENV not in os.environ
    assert vllm_compat.CONNECTOR_NAME == envs.VLLM_MEDIA_CONNECTOR


def test_the_operator_can_choose_stocks_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    register()
    monkeypatch.setenv(vllm_compat.CONNECTOR_ENV, "http")
    assert envs.VLLM_MEDIA_CONNECTOR == "http"
