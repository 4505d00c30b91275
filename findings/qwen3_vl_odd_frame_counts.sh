#!/usr/bin/env bash
# transformers 5.19.0: a video of 5, 9, 13... frames takes more pixels, and more tokens, of Qwen3-VL's video
# processor than its budget (`size["longest_edge"]`, pixels of all frames) allows, and than one frame more takes.
#
# The processor adds frames until whole pairs are there, so 5 frames are encoded as 6. But it checks the budget
# with round(5 / 2) * 2 frames, and Python rounds 2.5 to 2: 4 frames. So 5 frames are not shrunk where 4 just
# fit, and take 1.5 times the budget; 9 frames take 1.25 times. Who plans tokens by the budget should ask for
# even numbers of frames.
#
# Seen: transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11, Linux x86-64:
#     4 frames: 320x320, 200 tokens, 1.00 of the budget
#     5 frames: 320x320, 300 tokens, 1.50 of the budget
#     6 frames: 256x256, 192 tokens, 0.96 of the budget
#     9 frames: 320x320, 500 tokens, 1.25 of the budget
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
install torch==2.13.0+cpu 2>/dev/null ||
  install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
install transformers==5.19.0 numpy==2.3.5 pillow
cat >check.py <<'EOT'
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

PATCH, PAIR = 32, 2  # A token stands for 32x32 pixels of two frames.


def resized(frames, width, height, budget):
    """Width and height that the processor gives to frames, within a budget of pixels of them all."""
    rows, columns = smart_resize(frames, height, width, PAIR, PATCH, 4096, budget)
    return columns, rows


def encoded(frames, budget):
    """The share of the budget that frames of 320x320 take once they are whole pairs."""
    width, height = resized(frames, 320, 320, budget)
    whole = frames + frames % PAIR
    tokens = whole // PAIR * (width // PATCH) * (height // PATCH)
    share = whole * width * height / budget
    print(f"{frames} frames: {width}x{height}, {tokens} tokens, {share:.2f} of the budget")
    return share


four = 4 * 320 * 320
assert encoded(4, four) <= 1
assert encoded(5, four) > 1, "the budget is kept now"
assert encoded(6, four) <= 1
assert encoded(9, 2 * four) > 1, "the budget is kept now"
EOT
venv/bin/python check.py 2>/dev/null
