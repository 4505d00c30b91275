"""A small fleet, for tests of its simulation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vllm_mm_ext.fleet.shapes import MediumCosts, ReplicaShape
from vllm_mm_ext.fleet.simulation import Fleet, simulate
from vllm_mm_ext.fleet.tally import Tally
from vllm_mm_ext.fleet.traffic import Ask, Traffic
from vllm_mm_ext.planner.rates import HostCosts, Rates
from vllm_mm_ext.planner.step_costs import StepCosts

STEP = StepCosts(
    step=5e-3,
    decodes=1e-4,
    decode_context=1e-8,
    prompts=1e-3,
    prefill=1e-4,
    pairs=0.0,
    encodes=1e-3,
    items=0.0,
    vision=0.0,
    vision_pairs=0.0,
    audio=0.0,
)
HOST = HostCosts(
    request=1e-3,
    medium=0.0,
    sent_input=0.0,
    token=0.0,
    probe=0.0,
    decode=0.0,
    megapixel={},
    frame_megapixel=0.0,
    sound_second=0.0,
    preprocess=0.0,
    preprocess_input=0.0,
    preprocess_sound_second=0.0,
    decode_threads=1.0,
    engine_threads=1.0,
)
SHAPE = ReplicaShape(
    kv_blocks=400,
    block_size=16,
    device_bytes=2_000,
    host_bytes=6_000,
    decoded_bytes=5_000,
    decode_workers=2,
    slots=4,
    step_tokens=1024,
    hidden_size=256,
    rates=Rates(STEP, HOST),
    cores=math.inf,
)
VIDEO = MediumCosts(
    tokens=800,
    items=4,
    encode_s=0.2,
    output_bytes=1_000,
    decoded_bytes=1_000,
    decode_s=0.1,
    preprocess_s=0.01,
    main_s=0.001,
    again_s=0.0005,
    inputs_s=0.0,
)
UNIT = replace(VIDEO, tokens=20, items=1, encode_s=0.01, output_bytes=50, decode_s=0.0)
TRAFFIC = Traffic(
    requests=400,
    rate=3.0,
    videos=12,
    zipf=0.8,
    turns=3.0,
    think_s=4.0,
    kinds=1,
    text=20,
    output=10,
)


def fleet(replicas: int = 3, encoders: int = 0, **shape: Any) -> Fleet:
    """Replicas that serve videos (kind 0) and units of live sessions (kind 1)."""
    return Fleet(replace(SHAPE, **shape), (VIDEO, UNIT), replicas, encoders)


def serve(asks: Iterable[Ask], routing: str = "media-key", **options: Any) -> Tally:
    """Serve requests by a small fleet, or by ``served_by``."""
    return simulate(options.pop("served_by", fleet()), asks, routing, **options)
