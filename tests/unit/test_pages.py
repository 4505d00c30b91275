"""The pages of the documentation name files that exist, and their tables are whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A path in backticks: a Python file, or a folder written with a slash at its end.
_PATH = re.compile(r"`((?:[\w-]+/)*(?:\w+\.py|[\w-]+/))`")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def paths() -> set[str]:
    """Files and folders of the project, relative to its root."""
    tops = ("vllm_mm_ext", "tests", "scripts", "configs", "deploy", "docs")
    return {
        path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "")
        for top in tops
        for path in (ROOT / top, *(ROOT / top).rglob("*"))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_python_files_and_folders_that_exist(page: Path, paths: set[str]) -> None:
    named = set(_PATH.findall(page.read_text()))
    missing = [name for name in named if not any(f"/{p}".endswith(f"/{name}") for p in paths)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = set(_LINK.findall(page.read_text()))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_a_table_is_one_line(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert not [line for line in lines if line.startswith("|") != line.endswith("|")]
