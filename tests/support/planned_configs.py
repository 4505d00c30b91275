"""Writes the shipped ``configs/*.h100.yaml`` with ``vllm-mm plan``; run it to write them anew.

PYTHONPATH=. python tests/support/planned_configs.py
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

from released_models import released

from vllm_mm_ext.tools.cli.main import app

CONFIGS = Path(__file__).parents[2] / "configs"
# Commands by file: what they are for is one video of a length that the model takes well, with
# room in the context for further turns.
COMMANDS = {
    "qwen2.5-vl-7b.h100.yaml": (
        "plan Qwen/Qwen2.5-VL-7B-Instruct --gpu h100-80gb --video 128s@2fps:720p --image 2 "
        "--text 512 --out 256 --concurrency 24 --context 65536 "
        """--mm-processor-kwargs '{"max_pixels": 200704}'"""
    ),
    "qwen3-vl-8b.h100.yaml": (
        "plan Qwen/Qwen3-VL-8B-Instruct --gpu h100-80gb --video 128s@2fps:720p --image 2 "
        "--text 512 --out 256 --concurrency 16 --context 65536"
    ),
    "qwen2.5-omni-7b.h100.yaml": (
        "plan Qwen/Qwen2.5-Omni-7B --gpu h100-80gb --video 64s@2fps:720p --audio 30s --image 2 "
        "--text 512 --out 256 --concurrency 32 --context 32768 "
        """--mm-processor-kwargs '{"max_pixels": 200704}'"""
    ),
    "qwen3-omni-30b-a3b.h100.yaml": (
        "plan Qwen/Qwen3-Omni-30B-A3B-Instruct --gpu h100-80gb --video 64s@2fps:720p --audio 30s "
        "--image 2 --text 512 --out 256 --concurrency 4 --context 32768 "
        """--mm-processor-kwargs '{"max_pixels": 262144}'"""
    ),
    "llava-onevision-7b.h100.yaml": (
        "plan llava-hf/llava-onevision-qwen2-7b-ov-hf --gpu h100-80gb --video 32s@1fps:720p "
        "--image 1 --text 512 --out 256 --concurrency 64 --context 32768"
    ),
}


def written(command: str, file: str, folder: Path) -> str:
    """What a command writes.

    Args:
        command: The command without ``vllm-mm``; it names a model in ``released_models``.
        file: The file that it writes, relative to ``folder``.
        folder: Where to work.
    """
    words = shlex.split(command)
    name = words[1]
    words[1] = str(released(name, folder))
    words += ["--name", name, "--yaml", file, "--no-estimate"]
    (folder / file).parent.mkdir(exist_ok=True)
    before, arguments = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["vllm-mm", *words]
    try:
        app(words, standalone_mode=False)
    finally:
        os.chdir(before)
        sys.argv = arguments
    return (folder / file).read_text()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        for file, command in COMMANDS.items():
            (CONFIGS / file).write_text(written(command, f"configs/{file}", Path(work)))
