"""Tiny random checkpoints of real architectures, built offline, that vLLM serves.

Each has its family's real architecture, processor, special tokens and placeholder layout, a small
byte-level tokenizer and seeded random weights; its answers are gibberish that depends on the media.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_mm_ext.testing.checkpoints.sizes import Sizes

_MANIFEST = "tiny_checkpoint.json"


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: Key in ``FAMILIES``.
        modalities: Media it takes: subset of ``image``, ``video``, ``audio``.
        builder: ``module:function`` under this package.
    """

    name: str
    modalities: frozenset[str]
    builder: str


def _family(name: str, module: str, *modalities: str) -> Family:
    return Family(name, frozenset(modalities), f"{module}:build_{name}")


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            _family("qwen2_5_omni", "omni", "image", "video", "audio"),
            _family("qwen3_omni", "omni", "image", "video", "audio"),
            _family("qwen2_5_vl", "qwen_vl", "image", "video"),
            _family("qwen3_vl", "qwen_vl", "image", "video"),
            _family("llava_onevision", "llava_onevision", "image", "video"),
            _family("internvl", "internvl", "image", "video"),
            _family("qwen2_audio", "qwen2_audio", "audio"),
            _family("composer", "composer", "video", "audio"),
        )
    }
)


def cache_root() -> Path:
    """Where built checkpoints and bench media live: ``VLLM_MM_EXT_CACHE`` or the user cache."""
    override = os.environ.get("VLLM_MM_EXT_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "vllm_mm_ext"


def build(family: str, path: Path, *, seed: int = 0, **sizes: int) -> Path:
    """Build a checkpoint at ``path``, unless the same one is already there.

    Args:
        family: Key of ``FAMILIES``.
        path: Directory to create; another checkpoint there is replaced.
        seed: Seed of the random weights.
        sizes: Overrides of ``Sizes`` fields.

    Returns:
        ``path``.

    Raises:
        KeyError: Unknown family.
        TypeError: Unknown size.
        FileExistsError: ``path`` holds something that is not a tiny checkpoint.
    """
    if family not in FAMILIES:
        raise KeyError(f"unknown family {family!r}; one of {', '.join(FAMILIES)}")
    chosen = Sizes(**sizes)
    manifest = _manifest(family, seed, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may want the same checkpoint at once; the second finds it built.
    with open(path.parent / f".{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _read_manifest(path) == manifest:
            return path
        if path.exists() and any(path.iterdir()) and not (path / _MANIFEST).exists():
            raise FileExistsError(f"{path} is not a tiny checkpoint; not overwriting it")
        module, _, function = FAMILIES[family].builder.partition(":")
        builder = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            builder(scratch, seed, chosen)
            (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            shutil.rmtree(path, ignore_errors=True)
            scratch.chmod(0o755)
            scratch.rename(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def checkpoint(family: str, cache_dir: Path | None = None) -> Path:
    """The default checkpoint of a family, built on first use.

    Args:
        family: Key of ``FAMILIES``.
        cache_dir: Directory of checkpoints; default ``checkpoints`` under ``cache_root()``.
    """
    return build(family, (cache_dir or cache_root() / "checkpoints") / family)


def _manifest(family: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    import transformers

    return {
        "builders": _builders_digest(),
        "family": family,
        "seed": seed,
        "transformers": transformers.__version__,
        "sizes": dataclasses.asdict(sizes),
    }


def _builders_digest() -> str:
    """Changes whenever this package does, so that cached checkpoints are rebuilt."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest
