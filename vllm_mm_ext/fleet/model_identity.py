"""Which model a checkpoint is, wherever it lies and however its path is spelled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from blake3 import blake3

_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Of each file of weights so many pieces of so many bytes are read, spread evenly.
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def model_identity(directory: Path) -> str:
    """The identity of a checkpoint in a directory.

    Of a snapshot in Hugging Face's cache, the commit. Of any other directory, a digest of its JSON
    files (configuration, processor, tokenizer) and of samples of its weights: two trainings of one
    model have equal configurations and sizes.

    Raises:
        OSError: A file cannot be read.
    """
    resolved = directory.resolve()
    if resolved.parent.name == "snapshots" and _COMMIT.fullmatch(resolved.name):
        return f"commit {resolved.name}"
    hasher = blake3()
    for path in sorted(resolved.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt", ".model"):
            hasher.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            hasher.update(path.read_bytes())
        elif path.suffix in _WEIGHTS:
            size = path.stat().st_size
            hasher.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                for number in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    hasher.update(file.read(_SAMPLE_BYTES))
    return f"content {hasher.hexdigest(16)}"
