"""The guides: the commands in them work, in the order in which they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllm_mm_ext.testing.server import free_port, running

_ROOT = Path(__file__).resolve().parents[2]
_DOCS = _ROOT / "docs"
_GUIDES = sorted((_DOCS / "guides").glob("*.md"))
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.S | re.M
)
# Of one command.
_TIMEOUT_S = 240


@dataclass(frozen=True)
class Block:
    """A fenced block of a guide.

    Attributes:
        kind: `console` or `python`.
        text: What is run.
        why_not: Why it is not run, or empty.
    """

    kind: str
    text: str
    why_not: str


def _blocks(page: Path) -> list[Block]:
    return [
        Block(one["kind"], one["text"], (one["why"] or "").strip())
        for one in _BLOCK.finditer(page.read_text())
    ]


@pytest.mark.parametrize("page", [_DOCS / "index.md", *_GUIDES], ids=lambda page: page.stem)
def test_every_block_of_a_guide_is_run_or_says_why_it_is_not(page: Path) -> None:
    for block in _blocks(page):
        assert block.kind in ("console", "python") or block.why_not, block.text


def _media(folder: Path) -> None:
    """The files of which the guides speak: what a reader brings along."""
    import numpy as np
    from PIL import Image

    from vllm_mm_ext.composer.training.clips import draw_clip
    from vllm_mm_ext.composer.training.render import encode_clip

    encode_clip(draw_clip(1_000_003, 12), folder / "clip.mp4")
    encode_clip(draw_clip(1_000_004, 90), folder / "meeting.mp4")
    picture = np.full((120, 160, 3), (200, 30, 30), np.uint8)
    Image.fromarray(picture).save(folder / "frame.jpg")


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("page", _GUIDES, ids=lambda page: page.stem)
def test_the_commands_of_a_guide_work_one_after_the_other(page: Path, tmp_path: Path) -> None:
    _media(tmp_path)
    port = free_port()
    with ExitStack() as stack:
        for number, block in enumerate(_blocks(page)):
            if block.why_not:
                continue
            text = block.text.replace("localhost:8000", f"localhost:{port}")
            if "vllm serve" in text:
                script = f"{text.rstrip()} --port {port}"
                log = tmp_path / f"server-{number}.log"
                command = ("bash", "-euc", script)
                stack.enter_context(running(command, _environment(), port, log, cwd=tmp_path))
                continue
            command = ("bash", "-euc", text) if block.kind == "console" else ("python", "-c", text)
            done = subprocess.run(
                command,
                cwd=tmp_path,
                env=_environment(),
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
