"""When vLLM changes underneath, a feature falls back to stock with one warning; no other does."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from packaging.version import Version

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.names.names_check import IncompatibleError, VllmName
from vllm_mm_ext.adapters.patches import before_entry_changes, ledger, replace_attribute, wrap
from vllm_mm_ext.adapters.vllm_compat import Feature, activate
from vllm_mm_ext.plugin import FEATURES, register


def test_every_feature_is_active_on_the_supported_vllm() -> None:
    assert vllm_compat.check_version() is None
    assert [status.reason for status in register() if not status.active] == []


# An engine, the process that serves, and servers whose VLLM_PLUGINS is set.
PROCESSES = """
import multiprocessing, os
from vllm_mm_ext.adapters.vllm_compat import warn_if_unnamed

engine = multiprocessing.get_context("fork").Process(target=warn_if_unnamed)
engine.start()
engine.join()
os.write(2, b"in an engine")
warn_if_unnamed()
os.write(2, b"in the server")
for value in ("", "other", "mm_ext"):
    os.environ["VLLM_PLUGINS"] = value
    warn_if_unnamed.cache_clear()
    warn_if_unnamed()
"""


def test_only_the_process_that_serves_says_that_the_plugin_is_not_named() -> None:
    env = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    command = [sys.executable, "-c", PROCESSES]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    in_engine, _, later = done.stderr.partition("in an engine")
    in_server, _, named = later.partition("in the server")
    told = [vllm_compat.UNNAMED in said for said in (in_engine, in_server, named)]
    assert told == [False, True, False]


def test_a_plugin_that_is_not_named_says_once_what_of_it_is_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    vllm_compat.warn_if_unnamed.cache_clear()
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        register()
        vllm_compat.warn_if_unnamed()
    assert caplog.text.count(vllm_compat.UNNAMED) == 1


def test_registering_twice_installs_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    first, places = EngineArgs.create_engine_config, ledger()
    register()
    assert EngineArgs.create_engine_config is first
    assert ledger() == places


def test_what_is_changed_in_vllm_is_on_record() -> None:
    register()
    places = ledger()
    # These add routes, by vLLM's own interface for them.
    routes = {"live sessions", "health checks"}
    assert set(places) == {feature.name for feature in FEATURES} - routes
    assert "vllm.renderers.base:BaseRenderer.render_chat_async" in places["planning"]


@pytest.mark.parametrize(
    "path",
    [
        "vllm.gone:Thing",
        "vllm.plugins:gone",
        "vllm.renderers.base:BaseRenderer.gone",
        "vllm.renderers.base:BaseRenderer.render_chat.gone",
    ],
)
@pytest.mark.parametrize("by_source", [False, True])
def test_a_missing_name_turns_off_its_feature_with_one_warning(
    path: str, by_source: bool, caplog: pytest.LogCaptureFixture
) -> None:
    installed: list[str] = []
    broken = Feature(
        "broken",
        "this is lost",
        (VllmName(path, by_source=by_source),),
        lambda: installed.append("broken"),
    )
    other = Feature(
        "other",
        "nothing",
        (VllmName("vllm.plugins:load_general_plugins"),),
        lambda: installed.append("other"),
    )
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        first, second = activate([broken, other])
    assert (first.active, second.active) == (False, True)
    assert installed == ["other"]
    assert "gone" in first.reason
    assert len(caplog.records) == 1
    assert "'broken' is off" in caplog.text
    assert "this is lost" in caplog.text


# A module as a later vLLM may have it, with what a feature expects of each of its names.
LATER = """
class Later:
    def fewer(self, a): ...
    def any_other(self, **kwargs): ...
    def needs_more(self, a, b, c): ...
    def takes_more(self, a, b, c=None): ...
    def by_name(self, a, b, *, c): ...
    def by_name_with_default(self, a, b, *, c=None): ...
    @classmethod
    def of_class(cls, a, b, c): ...
    @staticmethod
    def of_none(a, b): ...
"""


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("later")
    (folder / "later_vllm.py").write_text(LATER)
    sys.path.insert(0, str(folder))
    yield "later_vllm:Later"
    sys.path.remove(str(folder))
    sys.modules.pop("later_vllm", None)


@pytest.mark.parametrize("by_source", [False, True])
@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("fewer", "no longer takes b"),
        ("any_other", None),
        ("needs_more", "needs c now"),
        ("takes_more", None),
        ("by_name", "needs c now"),
        ("by_name_with_default", None),
        ("of_class", "needs c now"),
        ("of_none", None),
    ],
)
def test_parameters_are_those_that_the_plugin_uses(
    later: str, method: str, problem: str | None, by_source: bool
) -> None:
    name = VllmName(f"{later}.{method}", ("a", "b"), by_source=by_source)
    if problem is None:
        name.check()
    else:
        with pytest.raises(IncompatibleError, match=problem):
            name.check()


@pytest.mark.parametrize("by_source", [False, True])
def test_what_is_passed_on_may_need_more(later: str, by_source: bool) -> None:
    name = VllmName(f"{later}.needs_more", ("a",), by_source=by_source, passed_on=True)
    name.check()
    with pytest.raises(IncompatibleError, match="no longer takes d"):
        replace(name, params=("d",)).check()


@pytest.mark.parametrize("by_source", [False, True])
def test_a_parameter_that_may_be_a_limit_has_to_be_known(later: str, by_source: bool) -> None:
    name = VllmName(f"{later}.takes_more", ("a", "b"), by_source=by_source, optional=("c",))
    name.check()
    with pytest.raises(IncompatibleError, match="takes c now, which the plugin does not know"):
        replace(name, optional=()).check()


def test_a_feature_is_installed_whole_or_not_at_all(caplog: pytest.LogCaptureFixture) -> None:
    from vllm import envs
    from vllm.model_executor.models import ModelRegistry
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.core import EngineCore

    def seen() -> tuple[object, ...]:
        return (
            vars(BaseRenderer)["render_chat"],
            dict(envs.environment_variables),
            dict(ModelRegistry.models),
            "test_only" in vars(EngineCore),
        )

    def passing_on(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: original(*args, **kwargs)

    def install() -> None:
        wrap(BaseRenderer, "render_chat", passing_on)
        replace_attribute(EngineCore, "test_only", 1)
        vllm_compat.override_models({"TestOnlyModel": "a:B", "Qwen2ForCausalLM": "a:B"})
        before_entry_changes(envs.environment_variables, "VLLM_PORT", "test")
        envs.environment_variables["VLLM_PORT"] = lambda: 1
        raise RuntimeError("no such luck")

    before = seen()
    halves = (
        Feature("fails to install", "a", (), install),
        Feature(
            "fails its probe",
            "b",
            (),
            lambda: replace_attribute(EngineCore, "test_only", 1),
            probe=lambda: VllmName("vllm.gone:Thing").check(),
        ),
    )
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        first, second, third = activate([*halves, Feature("c", "c", (), lambda: None)])
    assert (first.active, first.reason) == (False, "no such luck")
    assert not second.active
    assert third.active
    assert len(caplog.records) == 2
    assert seen() == before
    assert not set(ledger()) & {feature.name for feature in halves}


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
