"""A copy of the installed vLLM in which names are called otherwise, everywhere: a later release."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from pathlib import Path


def build_renamed(folder: Path, names: Collection[str]) -> None:
    """Put a package ``vllm`` into ``folder`` that works as the installed one does.

    Files that use none of the names are links.

    Args:
        folder: Where; to be put on ``PYTHONPATH``.
        names: What to rename, each to itself and ``_renamed``.
    """
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    (source,) = spec.submodule_search_locations or ()
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    changed: dict[Path, str] = {}
    for path in Path(source).rglob("*.py"):
        text, count = pattern.subn(r"\1_renamed", path.read_text())
        if count:
            changed[path] = text
    found = {name for name in names if any(f"{name}_renamed" in text for text in changed.values())}
    assert found == set(names), "vLLM has none of these names"
    holding = {parent for path in changed for parent in path.parents}

    def place(directory: Path, target: Path) -> None:
        target.mkdir(parents=True)
        for path in directory.iterdir():
            if path in holding:
                place(path, target / path.name)
            elif path in changed:
                (target / path.name).write_text(changed[path])
            elif path.name != "__pycache__":
                (target / path.name).symlink_to(path)

    place(Path(source), folder / "vllm")
