"""The composer that ships with the package says the same in vLLM as in plain PyTorch."""

from __future__ import annotations

import pytest
from engine_script import run_script

from vllm_mm_ext.tools.cli.demo import shipped_model

SHIPPED = shipped_model()
# A step of bfloat16 for logits between 8 and 16, which both round in places of their own.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2**-4 + 1e-3}


@pytest.mark.engine
@pytest.mark.skipif(SHIPPED is None, reason="the package has no checkpoint")
def test_answers_about_a_known_clip_are_those_of_plain_pytorch() -> None:
    outcomes = run_script("composer_shipped_engine.py", SHIPPED, timeout_s=300)
    for dtype, said in outcomes.items():
        assert len({tuple(one["tokens"]) for one in said["plain"]}) > 1
        same = 0
        for got, expected in zip(said["served"], said["plain"], strict=True):
            assert got["prompt"] == expected["prompt"]
            # What a model says after it has ended is no answer.
            ends = [*expected["tokens"], said["eos"]].index(said["eos"]) + 1
            ours, theirs = got["tokens"][:ends], expected["tokens"][:ends]
            same += ours == theirs
            # Tokens that are equally likely, to a step of the type, may take each other's place.
            alike = next((i for i in range(len(ours)) if ours[i] != theirs[i]), ends - 1) + 1
            assert got["logprobs"][:alike] == pytest.approx(
                expected["logprobs"][:alike], abs=TOLERANCE[dtype]
            )
        assert same >= (1.0 if dtype == "float32" else 0.9) * len(said["plain"]), dtype
