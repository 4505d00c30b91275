"""Rules about the package itself that ``lint-imports`` does not know."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import vllm_mm_ext

PACKAGE = Path(vllm_mm_ext.__file__).parent
# Rooms with a module per model family: the same family has the same name in each.
FAMILY_ROOMS = ("adapters/models", "adapters/processors", "testing/checkpoints")


def modules() -> list[Path]:
    return [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]


def test_no_two_modules_share_a_file_name_but_those_of_one_model_family():
    places: dict[str, list[Path]] = defaultdict(list)
    for module in modules():
        places[module.name].append(module)
    shared = {
        name: found
        for name, found in places.items()
        if len(found) > 1 and any(str(p.parent) not in FAMILY_ROOMS for p in found)
    }
    assert not shared


def test_every_file_is_readable_in_one_sitting():
    long = {str(p): n for p in modules() if (n := len((PACKAGE / p).read_text().split("\n"))) > 401}
    assert not long


def test_the_package_has_one_context_variable():
    made = {
        str(path.relative_to(PACKAGE)): count
        for path in PACKAGE.rglob("*.py")
        if (count := path.read_text().count("ContextVar("))
    }
    assert made == {"request/context.py": 1}
