"""What work costs on the hardware that a command plans for: measured, or from its data sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from vllm_mm_ext.planner.calibration_file import Calibration
    from vllm_mm_ext.planner.gpu_facts import GpuFacts
    from vllm_mm_ext.planner.model_facts import ModelFacts
    from vllm_mm_ext.planner.plan import Plan
    from vllm_mm_ext.planner.rates import RatesRange


class RatesError(ValueError):
    """A calibration cannot be used; the message names the file or what it was measured on."""


def chosen_rates(plan: Plan, model: str, calibration: Path | None) -> tuple[RatesRange, str] | None:
    """Rates of a plan's server, and where they are from; None where nothing tells.

    Args:
        plan: The plan.
        model: Name or folder of its model, as the user gave it.
        calibration: A file of `vllm-mm calibrate`, if there is one.

    Raises:
        RatesError: The file cannot be read, or is of other hardware.
    """
    from vllm_mm_ext.planner.calibration_file import read
    from vllm_mm_ext.planner.roofline import roofline

    facts, site = plan.facts, plan.site
    if calibration is None:
        bound = roofline(facts, site.gpu, site.tp, site.dp, decodes=plan.per_engine)
        source = "from the GPU's data sheet; `vllm-mm calibrate` measures"
        if facts.quantization and site.gpu.bf16_flops is not None:
            _warn(
                f"no estimate of weights quantised by {facts.quantization} from a data sheet; "
                "`vllm-mm calibrate` measures them for --calibration"
            )
        return None if bound is None else (bound, source)
    try:
        measured = read(calibration)
    except (OSError, ValueError) as error:
        raise RatesError(f"--calibration {calibration}: {error}") from error
    _check(measured, facts, model, site.gpu, site.tp)
    by = f"{measured.model} on {measured.machine}, {measured.date}"
    return measured.rates, f"by `vllm-mm calibrate` with {by}"


def _check(measured: Calibration, facts: ModelFacts, model: str, gpu: GpuFacts, tp: int) -> None:
    """Refuse rates of other hardware; tell of those of another model."""
    was = f"--calibration: it is of {measured.model} on {measured.device} with tp {measured.tp}"
    if (measured.device.lower() == "cpu") != gpu.is_cpu or measured.tp != tp:
        raise RatesError(f"{was}, the plan is for {gpu.title} with tp {tp}")
    known = gpu.bf16_flops is not None
    other_gpu = known and gpu.name.partition("-")[0] not in measured.device.lower()
    if other_gpu or measured.model not in (model, facts.name):
        _warn(f"{was}, the plan is for {facts.name} on {gpu.title}: estimates may be far off")
    if measured.dtype not in ("", facts.dtype):
        _warn(
            f"--calibration: it is of weights in {measured.dtype}, the plan's are in "
            f"{facts.dtype}: estimates may be off; `vllm-mm calibrate --config` measures a plan's "
            "own server"
        )


def _warn(text: str) -> None:
    console = Console(stderr=True)
    console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)
