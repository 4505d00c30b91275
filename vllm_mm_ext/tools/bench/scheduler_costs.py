"""What an engine step costs by what is in it: measured on a real engine, kept in a text file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

import vllm_mm_ext
from vllm_mm_ext.planner.step_costs import fit_prices

MEASURED = Path(vllm_mm_ext.__file__).parent / "assets" / "scheduler" / "step_costs.txt"
_HEAD = """\
# Seconds of an engine step, by what is in it: written by `vllm-mm bench scheduler --measure FILE`.
# {source}
# Half of the {steps} steps measured are within {off:.0%} of what these add up to.
"""


@dataclass(frozen=True, slots=True)
class StepContents:
    """What a step holds.

    Attributes:
        decodes: Requests that decode.
        decode_context: Tokens that these attend to, in all.
        prompts: 1 if tokens of a prompt are computed, else 0.
        prefill: Tokens of prompts.
        pairs: Pairs of such a token and one that it attends to.
        calls: 1 if anything is encoded, else 0.
        items: Items encoded.
        encoded: Encoder outputs of these.
    """

    decodes: int = 0
    decode_context: int = 0
    prompts: int = 0
    prefill: int = 0
    pairs: float = 0.0
    calls: int = 0
    items: int = 0
    encoded: int = 0

    @classmethod
    def of(cls, requests: Any, output: Any) -> StepContents:
        """Of a step that vLLM has scheduled.

        Args:
            requests: vLLM's requests, by id; their computed tokens count those of the step.
            output: vLLM's ``SchedulerOutput``.
        """
        decodes = context = prefill = items = encoded = 0
        pairs = 0.0
        for key, tokens in output.num_scheduled_tokens.items():
            before = requests[key].num_computed_tokens - tokens
            if before < requests[key].num_prompt_tokens:
                prefill += tokens
                pairs += tokens * (before + tokens / 2)
            else:
                decodes += 1
                context += before
        for key, indices in output.scheduled_encoder_inputs.items():
            items += len(indices)
            encoded += sum(requests[key].get_num_encoder_embeds(index) for index in indices)
        return cls(decodes, context, prefill > 0, prefill, pairs, items > 0, items, encoded)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step as a sum: ``step`` of each one, the others for each of its contents."""

    step: float
    decodes: float
    decode_context: float
    prompts: float
    prefill: float
    pairs: float
    calls: float
    items: float
    encoded: float

    def seconds(self, contents: StepContents) -> float:
        """How long a step takes."""
        return self.of(**asdict(contents))

    def of(self, **contents: float) -> float:
        """Seconds of a step with some contents and nothing else."""
        total = self.step
        for name, count in contents.items():
            total += getattr(self, name) * count
        return total

    @classmethod
    def fitted(cls, steps: Sequence[tuple[StepContents, float]]) -> tuple[StepCosts, float]:
        """Non-negative costs that explain measured steps best, and the median error of these.

        Args:
            steps: What each step held, and the seconds it took.
        """
        held = [astuple(contents) for contents, _ in steps]
        prices, ratios = fit_prices(held, [seconds for _, seconds in steps])
        return cls(*prices), float(np.median(np.abs(1 / ratios - 1)))

    def write(self, file: Path, *, source: str, steps: int, off: float) -> None:
        """Keep them in a text file.

        Args:
            file: The file.
            source: Where they were measured, for whoever reads the file.
            steps: How many steps were.
            off: The median error of what they add up to, as a share.
        """
        lines = [f"{field.name} {getattr(self, field.name):.4g}" for field in fields(self)]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_HEAD.format(source=source, steps=steps, off=off) + "\n".join(lines) + "\n")

    @classmethod
    def read(cls, file: Path) -> StepCosts:
        """Read what ``write`` wrote.

        Raises:
            ValueError: It is no such file; the message says which line or name is wrong.
        """
        found: dict[str, float] = {}
        names = [field.name for field in fields(cls)]
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, value = line.partition(" ")
            try:
                found[name] = float(value)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {value!r} is no number of seconds") from error
        if sorted(found) != sorted(names) or min(found.values()) < 0 or not found["step"]:
            raise ValueError(
                f"{file}: wanted are {', '.join(names)}, none below 0, step above; got "
                f"{', '.join(found) or 'nothing'}"
            )
        return cls(**found)


def measure(work_dir: Path, file: Path) -> None:
    """Measure on an engine that runs the model of ``mixed-traffic``, and write a file.

    Args:
        work_dir: Where the model is kept.
        file: The file.
    """
    import os
    import platform

    from vllm_mm_ext.testing.checkpoints import build
    from vllm_mm_ext.tools.bench import inprocess
    from vllm_mm_ext.tools.bench.mixed_traffic import MODEL, MODEL_SIZE

    model = build("qwen2_5_vl", work_dir / MODEL, **MODEL_SIZE)
    # One core is left to others, as in ``mixed-traffic``.
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) - 1))
    found = inprocess.measure("scheduler_costs_engine", "stock", [str(model)])
    steps = [(StepContents(*contents), seconds) for contents, seconds in found["steps"]]
    costs, off = StepCosts.fitted(steps)
    source = f"vLLM {found['vllm']}, {found['device']} ({platform.machine()}), model {MODEL}"
    costs.write(file, source=source, steps=len(steps), off=off)
