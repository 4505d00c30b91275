"""The files in ``deploy/`` name flags, variables, paths, ports and sizes that there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from packaging.requirements import Requirement
from planned_configs import written
from vllm import envs
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_mm_ext.adapters.serving.endpoints import MMExtEndpointPlugin
from vllm_mm_ext.config.root import MMExtConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
# Where files of the repository are in a container.
PLACES = {
    "/opt/mm-ext/configs/": ROOT / "configs",
    "/opt/mm-ext/encoders-apart/": DEPLOY / "encoders-apart",
}
PLANNED = ROOT / "configs" / "qwen2.5-omni-7b.h100.yaml"
FLEETS = ("compose.fleet.yaml", "compose.encoder.yaml")
PORT = 8000


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def services(name: str) -> dict[str, Any]:
    """The servers of a compose file; those with an encoder go on top of the fleet's."""
    found = read(name)["services"]
    if name == "compose.encoder.yaml":
        fleet = read("compose.fleet.yaml")["services"]
        found = {each: fleet.get(each, {}) | spec for each, spec in found.items()}
    return {each: spec for each, spec in found.items() if "vllm-mm-ext" in spec["image"]}


def in_repository(path: str) -> Path:
    """The file of the repository that is at a path in a container."""
    for place, folder in PLACES.items():
        if path.startswith(place):
            return folder / path.removeprefix(place)
    raise AssertionError(f"no file is at {path}")


def config_of(command: list[str]) -> Path:
    """The file that a server is started with."""
    return in_repository(command[command.index("--config") + 1])


def port_of(spec: dict[str, Any]) -> str:
    (port,) = (word for word in spec["command"] if word.startswith("--port="))
    return str(port.removeprefix("--port="))


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    """Values for the engines of vLLM's production stack, and of the one model in them."""
    engines = read("kubernetes/production-stack.values.yaml")["servingEngineSpec"]
    (model,) = engines["modelSpec"]
    return engines, model


def commands() -> Iterator[Any]:
    """What each server is started with, after ``vllm serve``."""
    for name in ("compose.yaml", *FLEETS):
        for service, spec in services(name).items():
            yield pytest.param(spec["command"], id=f"{name}-{service}")
    _, model = kubernetes()
    extra = model["vllmConfig"]["extraArgs"]
    # The chart's own come before.
    own = ["--host", "0.0.0.0", "--port", str(PORT), "--enable-prefix-caching"]
    yield pytest.param([model["modelURL"], *own, *extra], id="production-stack")


def parsed(command: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    # Offline, vLLM looks for the model's files while it parses; only the arguments matter here.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    place = command.index("--config") + 1
    words = [*command[:place], str(config_of(command)), *command[place + 1 :]]
    parser = FlexibleArgumentParser()
    subcommands = parser.add_subparsers(dest="subparser")
    for subcommand in cmd_init():
        subcommand.subparser_init(subcommands)
    return parser.parse_args(["serve", *words])


@pytest.mark.parametrize("command", commands())
def test_vllm_takes_each_command_with_its_config_file(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parsed(command, monkeypatch)
    # vLLM passes over `--config=FILE` in one word; only what the file holds shows that it was read.
    assert args.scheduler_cls == "vllm_mm_ext.scheduler.MMExtScheduler"
    assert MMExtConfig.from_additional_config(args.additional_config).encoder_cache.host_mb
    assert "/mm_ext/health" in args.disable_access_log_for_endpoints.split(",")


def planned(command: list[str]) -> tuple[str, ...]:
    """GiB of memory, GiB of shared memory and cores that the plan of the config file asks for."""
    file = config_of(command)
    # Files for encoders apart are the plan's but for some lines, and without its head.
    return asked_for((PLANNED if "encoders-apart" in str(file) else file).read_text())


def asked_for(file: str) -> tuple[str, ...]:
    """The same, by the text of the file."""
    text = " ".join(file.partition("\nmodel:")[0].replace("\n#", " ").split())
    found = re.search(
        r"needs (\d+) GiB of memory, of which /dev/shm may take (\d+) GiB, and (\d+) cores",
        text,
    )
    assert found is not None
    return found.groups()


@pytest.mark.parametrize("name", ["compose.yaml", *FLEETS])
def test_containers_get_what_the_plan_of_their_config_file_asks_for(name: str) -> None:
    for spec in services(name).values():
        memory, shm, cores = planned(spec["command"])
        limits = spec["deploy"]["resources"]["limits"]
        assert (limits["memory"], spec["shm_size"], limits["cpus"]) == (
            f"{memory}g",
            f"{shm}gb",
            cores,
        )


def test_the_container_of_the_guide_gets_what_the_plan_before_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command sets them, unless they are set.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    guide = (ROOT / "docs" / "deploy.md").read_text()
    found = re.search(
        r"^vllm-mm (plan .*) --yaml plan\.yaml\n(docker run .*)$", guide, re.MULTILINE
    )
    assert found is not None
    memory, shm, cores = asked_for(written(found[1], "plan.yaml", tmp_path))
    options = found[2].split()
    given = [options[options.index(name) + 1] for name in ("--memory", "--shm-size", "--cpus")]
    assert given == [f"{memory}g", f"{shm}g", cores]


def test_pods_get_what_the_plan_of_their_config_file_asks_for() -> None:
    _, model = kubernetes()
    memory, shm, cores = planned(model["vllmConfig"]["extraArgs"])
    assert model["requestMemory"] == model["limitMemory"] == f"{memory}Gi"
    assert model["shmSize"] == f"{shm}Gi"
    assert str(model["requestCPU"]) == cores
    # Without this the chart mounts no shared memory, and without that it turns the cache off.
    assert model["vllmConfig"]["tensorParallelSize"] == 1
    assert model["vllmConfig"]["enablePrefixCaching"]
    # The chart has one volume for all pods.
    assert "ReadWriteMany" in model["pvcAccessMode"]


def routes() -> set[str]:
    app = FastAPI()
    plugin = MMExtEndpointPlugin()
    plugin.health_checks = True
    plugin.attach_router(app)
    return {getattr(route, "path", "") for route in app.routes}


def test_health_is_asked_of_a_route_that_knows_about_decode_workers() -> None:
    engines, _ = kubernetes()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = engines[probe]["httpGet"]
        assert asked["path"] in routes()
        assert asked["port"] == PORT
        # Who asks waits for longer than the answer takes.
        assert engines[probe]["timeoutSeconds"] > 1
    for spec in (spec for name in FLEETS for spec in services(name).values()):
        url = f"http://127.0.0.1:{port_of(spec)}/mm_ext/health"
        assert url in spec["healthcheck"]["test"][-1]
    # One server has the image's own check.
    (alone,) = services("compose.yaml").values()
    assert port_of(alone) == str(PORT)
    assert f"http://127.0.0.1:{PORT}/mm_ext/health" in (DEPLOY / "Dockerfile").read_text()


def test_servers_read_local_media_where_these_are_mounted() -> None:
    for name in ("compose.yaml", "compose.fleet.yaml"):
        for spec in services(name).values():
            mounted = [volume.split(":")[-2:] for volume in spec["volumes"]]
            assert ["/media", "ro"] in mounted
            assert "--allowed-local-media-path=/media" in spec["command"]


def test_servers_that_other_machines_reach_want_a_key() -> None:
    for spec in (spec for name in FLEETS for spec in services(name).values()):
        assert spec["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")
    engines, _ = kubernetes()
    assert engines["vllmApiKey"].keys() == {"secretName", "secretKey"}
    # One server alone is for its own machine.
    (alone,) = services("compose.yaml").values()
    assert alone["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]


def test_the_router_sends_to_the_servers_that_there_are() -> None:
    config = ROOT / "configs" / "routers" / "envoy.yaml"
    found = read("compose.fleet.yaml")["services"]
    assert "../configs/routers/envoy.yaml:/etc/envoy/envoy.yaml:ro" in found["router"]["volumes"]
    ports = re.findall(r"address: 127\.0\.0\.1, port_value: (\d+)", config.read_text())
    served = [port_of(spec) for spec in services("compose.fleet.yaml").values()]
    assert sorted(ports) == sorted(served)


def test_an_encoder_and_its_engines_make_the_same_of_the_same_media() -> None:
    planned = yaml.safe_load(PLANNED.read_text())
    for name, role in (("encoder", "ec_producer"), ("engine", "ec_consumer")):
        found = read(f"encoders-apart/{name}.yaml")
        transfer = json.loads(found.pop("ec-transfer-config"))
        assert transfer.pop("ec_role") == role
        shared = transfer.pop("ec_connector_extra_config")["shared_storage_path"]
        assert shared in (DEPLOY / "Dockerfile").read_text().split(), "its user may write there"
        assert all(f"outputs:{shared}" in spec["volumes"] for spec in services(FLEETS[1]).values())
        expected = planned | {}
        assert transfer | {"ec_role": "ec_both"} == json.loads(expected.pop("ec-transfer-config"))
        encoders = found["additional-config"]["mm_ext"]["encoder_cache"].pop("encoders", [])
        if role == "ec_producer":
            # An encoder takes prompts whole.
            assert found.pop("max-num-batched-tokens") >= expected["max-model-len"]
            del expected["max-num-batched-tokens"]
        else:
            port = port_of(services(FLEETS[1])["encoder"])
            assert encoders == [f"http://127.0.0.1:{port}"]
        assert found == expected


def dockerfile() -> list[list[str]]:
    """The instructions of the Dockerfile, as words."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_the_image_has_the_vllm_that_the_plugin_is_tested_with() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (version,) = (
        words[1].removeprefix("VLLM_VERSION=") for words in dockerfile() if words[0] == "ARG"
    )
    tested, served = Requirement(extras["cpu"][0]), Requirement(extras["cuda"][0])
    assert version in tested.specifier
    assert version in served.specifier
    assert "live" in extras


def test_the_image_sets_variables_that_there_are_and_runs_as_no_root() -> None:
    settings = dict(
        word.split("=", 1) for words in dockerfile() if words[0] == "ENV" for word in words[1:]
    )
    assert settings["VLLM_PLUGINS"] == "mm_ext"
    of_vllm = {name for name in settings if name.startswith("VLLM_")}
    assert of_vllm <= envs.environment_variables.keys()
    (user,) = (words[1] for words in dockerfile() if words[0] == "USER")
    assert user == "2000:0"
    engines, model = kubernetes()
    assert engines["securityContext"]["runAsUser"] == 2000
    assert {"name": "VLLM_PLUGINS", "value": "mm_ext"} in model["env"]


def test_what_the_image_copies_is_there_and_reaches_the_builder() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    copied = [word for words in dockerfile() if words[0] == "COPY" for word in words[1:-1]]
    assert copied
    for path in copied:
        assert (ROOT / path).exists()
        assert any(fnmatch(path, pattern) for pattern in sent)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    subprocess.run(["hadolint", str(DEPLOY / "Dockerfile")], check=True)


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="docker compose is not installed",
)
@pytest.mark.parametrize("names", [["compose.yaml"], [FLEETS[0]], FLEETS])
def test_compose_takes_the_files(names: Sequence[str]) -> None:
    files = [word for name in names for word in ("-f", str(DEPLOY / name))]
    environment = {**os.environ, "VLLM_API_KEY": "secret"}
    subprocess.run(["docker", "compose", *files, "config", "-q"], check=True, env=environment)
