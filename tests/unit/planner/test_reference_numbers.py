"""The tables of the reference design come out of the planner's own functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planner_facts import LLAMA_70B, VIT_L

import vllm_mm_ext
from vllm_mm_ext.composer.configuration import SAMPLE_RATE, ComposerConfig
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.planner.delivery import Delivery, frame_times
from vllm_mm_ext.planner.memory_parts import encoder_cache_bytes, encoder_peak
from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.video_tokens import EncoderShape, video_tokens
from vllm_mm_ext.planner.workload import Video
from vllm_mm_ext.video.segments import VideoLayout

KV_BYTES = 327_680


def visual_tokens(seconds: float, fps: float, side: int, reduction: Reduction) -> int:
    """Tokens of a video whose frames are patches of 14 x 14 pixels."""
    times = frame_times(Video(seconds, fps=fps), Delivery(1 << 20, min_frames=1), 1)
    rows = side // 14
    layout = VideoLayout((side, side), len(times), rows, rows, temporal_patch=1)
    stages, items = video_tokens(
        layout, reduction, 1024, EncoderShape(14), frames=len(times), text=0
    )
    assert sum(item.embeddings for item in items) == stages.temporal
    return stages.temporal


@pytest.mark.parametrize(("side", "tokens"), [(224, 256), (336, 576), (448, 1024)])
def test_tokens_of_a_frame_by_its_size(side, tokens):
    assert visual_tokens(1, 1, side, Reduction()) == tokens


@pytest.mark.parametrize(
    ("fps", "pool", "tokens"),
    [(30, 1, 460_800), (1, 1, 15_360), (0.5, 1, 7_680), (30, 2, 115_200)],
)
def test_tokens_of_a_minute_by_sampling(fps, pool, tokens):
    assert visual_tokens(60, fps, 224, Reduction(pool=pool)) == tokens


@pytest.mark.parametrize(
    ("seconds", "tokens"),
    [(10, 320), (60, 1_920), (300, 9_600), (1_800, 57_600), (7_200, 230_400)],
)
def test_tokens_of_the_composer_by_length(seconds, tokens):
    assert visual_tokens(seconds, 2, 224, Reduction(pool=2, temporal=4)) == tokens


@pytest.mark.parametrize(
    ("tokens", "blocks", "megabytes"),
    [
        *((512, 32, 168), (768, 48, 252), (3_072, 192, 1_006), (8_192, 512, 2_683)),
        *((2_012, 126, 660), (9_692, 606, 3_175)),
    ],
)
def test_kv_of_a_70b_model_by_kind_of_request(tokens, blocks, megabytes):
    assert LLAMA_70B.kv_bytes_per_token() == KV_BYTES
    found = RequestTokens(text=tokens, output=1).kv_blocks(16)
    assert found == blocks
    assert found * 16 * KV_BYTES == pytest.approx(megabytes * 1e6, rel=2e-3)


def test_kv_and_embeddings_of_a_minute_of_video():
    found = 1_920 * KV_BYTES + encoder_cache_bytes(LLAMA_70B, 1_920)
    assert found == pytest.approx(644e6, rel=2e-3)


@pytest.mark.parametrize(("seconds", "tokens"), [(5, 250), (30, 1_500), (120, 6_000)])
def test_audio_tokens_by_length(seconds, tokens):
    shipped = Path(vllm_mm_ext.__file__).parent / "assets" / "composer-tiny" / "config.json"
    config = ComposerConfig(**(json.loads(shipped.read_text()) | {"audio_stack": 1}))
    assert sum(config.audio_tokens(seconds * SAMPLE_RATE)) == tokens


def test_peak_of_an_encoder_that_keeps_every_layer():
    # Without autograd a layer's values are freed before the next one's.
    a_frame = encoder_peak(VIT_L, 256, 2, layers_kept=VIT_L.layers)
    assert a_frame == pytest.approx(150e6, rel=0.01)
    assert 30 * a_frame == pytest.approx(4.5e9, rel=0.01)
    assert encoder_peak(VIT_L, 256, 2) * VIT_L.layers == a_frame
