"""``python -m vllm_mm_ext.composer.training.train``: train a composer."""

from __future__ import annotations

import time
from collections import defaultdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from vllm_mm_ext.composer.configuration import ComposerConfig, register_config
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.batches import check_shares_clips
from vllm_mm_ext.composer.training.data import Ahead, folder_batches, generated_batches
from vllm_mm_ext.composer.training.evaluate import (
    accuracy,
    accuracy_table,
    held_out_notes,
    held_out_samples,
    held_out_windows,
    note_scores,
)
from vllm_mm_ext.composer.training.folder import digest_of, read_folder
from vllm_mm_ext.composer.training.model import fresh_model, tiny_config
from vllm_mm_ext.composer.training.processes import joined, launch, launched, rank, world
from vllm_mm_ext.composer.training.tokenizer import build_tokenizer
from vllm_mm_ext.composer.training.towers import train_towers
from vllm_mm_ext.composer.training.trainer import (
    Batches,
    Recipe,
    Trainer,
    has_state,
    save_checkpoint,
    saved_rate,
)

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
_console = Console()
_EVAL_CLIPS = 36
# Random weights, which are all that `--parts projectors` trains, need large steps. Released weights
# would forget by such what they were released for: as LLaVA-1.5 (Liu et al. 2024), a hundredth.
_FRESH_LR, _RELEASED_LR = 2e-3, 2e-5
# Steps between lines that say what is answered right so far.
_REPORT_STEPS = 100


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Parts(StrEnum):
    """What is trained."""

    all = "all"
    projectors = "projectors"


@app.command()
def train(
    output: Annotated[
        Path, typer.Argument(help="Directory of the checkpoint and of the state to resume from.")
    ],
    init: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint to start from, as compose_checkpoint makes them; "
            "without it, the shipped model's sizes with random weights. A training that is resumed "
            "has its own.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Train on clips with conversations.jsonl from here instead of the generator.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps in all, resumed ones included.")] = 6000,
    parts: Annotated[Parts, typer.Option(help="What is trained.")] = Parts.all,
    freeze_towers: Annotated[
        bool,
        typer.Option(
            "--freeze-towers", help="Encoders stay as they are; may be given when resuming."
        ),
    ] = False,
    lr: Annotated[
        float | None,
        typer.Option(
            min=1e-8,
            max=1.0,
            help=f"Highest learning rate; default: {_FRESH_LR:g} for what starts from random "
            f"weights, {_RELEASED_LR:g} for all parts of a checkpoint, when resuming as before.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=999, help="Decides weights and data.")] = 0,
    ramp: Annotated[
        int, typer.Option(min=0, help="Generator: steps until clips have full length.")
    ] = 1500,
    tower_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the towers alone, before the first (generator).")
    ] = 0,
    perception_steps: Annotated[
        int,
        typer.Option(min=0, help="Steps over which the loss on embeddings fades (generator)."),
    ] = 0,
    clips: Annotated[int, typer.Option(min=1, help="Folder: conversations of a batch.")] = 8,
    frames: Annotated[int, typer.Option(min=1, help="Folder: most frames of a clip.")] = 32,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.auto,
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--fp32", help="Compute in bfloat16; default: where it is fast."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's choice.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="CPU: data-parallel processes of one thread each.")
    ] = 1,
    save_minutes: Annotated[float, typer.Option(min=0.0, help="Minutes between saves.")] = 5.0,
    eval_every: Annotated[
        int, typer.Option(min=0, help="Steps between tables of held-out accuracy; 0: none.")
    ] = 500,
    export: Annotated[
        Path | None, typer.Option(help="Write the final weights here as well, in bfloat16.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the state in the output directory.")
    ] = False,
) -> None:
    """Train a composer on generated clips or on a folder, on CPU or CUDA."""
    place = _device(device)
    if processes > 1 and place.type != "cpu":
        raise typer.BadParameter("several processes train on the CPU", param_hint="--processes")
    if threads is not None and processes == 1:
        torch.set_num_threads(threads)
    if resume and not has_state(output):
        raise typer.BadParameter(f"{output} holds no state to resume", param_hint="--resume")
    if not resume and has_state(output):
        raise typer.BadParameter(
            f"{output} holds a training already; give --resume or another directory",
            param_hint="OUTPUT",
        )
    if processes > 1 and not launched():
        raise typer.Exit(launch(processes))
    model, tokenizer = _start(output if resume else init, seed, resume)
    model.to(place)
    if lr is None:
        released = init is not None and parts is Parts.all
        lr = saved_rate(output) if resume else _RELEASED_LR if released else _FRESH_LR
    recipe = Recipe(
        steps=steps,
        seed=seed,
        lr=lr,
        perception_steps=perception_steps,
        projectors_only=parts is Parts.projectors,
        freeze_towers=freeze_towers,
        autocast=_fast_bf16(place) if bf16 is None else bf16,
    )
    with joined():
        made, data = _batches(model, tokenizer, folder, seed, ramp, clips, frames)
        batches = Ahead(made)
        if tower_steps and not resume:
            _towers(model, tower_steps, seed)
        trainer = Trainer(model, tokenizer, recipe, batches, data)
        try:
            if resume:
                _resume(trainer, output)
            _loop(trainer, output, save_minutes * 60, eval_every if folder is None else 0)
        finally:
            batches.close()
        first = rank() == 0
    if export is not None and first:
        save_checkpoint(model, tokenizer, export, torch.bfloat16)
        _console.print(f"exported to {export}")


def _start(
    source: Path | None, seed: int, resume: bool
) -> tuple[ComposerForConditionalGeneration, Any]:
    if source is None:
        tokenizer = build_tokenizer()
        return fresh_model(tiny_config(tokenizer), seed), tokenizer
    # Else transformers warns of a type it does not know.
    register_config()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if resume:
        # The weights come with the state.
        return fresh_model(ComposerConfig.from_pretrained(source), seed).float(), tokenizer
    model = ComposerForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    return model, tokenizer


def _batches(
    model: ComposerForConditionalGeneration,
    tokenizer: Any,
    folder: Path | None,
    seed: int,
    ramp: int,
    clips: int,
    frames: int,
) -> tuple[Batches, dict[str, str | int]]:
    """The batches of a training, and what they follow from besides the seed and the model."""
    config, common = model.config, {"processes": world()}
    if folder is None:
        try:
            check_shares_clips(model)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--folder") from error
        batches = generated_batches(config, tokenizer, seed, ramp)
        return batches, {"folder": "none", "ramp": ramp, **common}
    try:
        conversations = read_folder(folder)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error), param_hint="--folder") from error
    batches = folder_batches(
        config, tokenizer, conversations, seed=seed, clips=clips, frames=frames
    )
    contents = f"with conversations of digest {digest_of(conversations)}"
    return batches, {"folder": contents, "clips": clips, "frames": frames, **common}


def _resume(trainer: Trainer, output: Path) -> None:
    try:
        trainer.resume(output)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--resume") from error


def _loop(trainer: Trainer, output: Path, save_s: float, eval_every: int) -> None:
    steps = trainer.recipe.steps
    size = int(trainer.model.config.vision_config.image_size)
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=_console,
        disable=rank() > 0,
    )
    first = rank() == 0
    saved = time.monotonic()
    loss_average = right_average = None
    asked: dict[str, list[bool]] = defaultdict(list)
    with progress:
        task = progress.add_task("", total=steps, completed=trainer.step, shown="")
        while trainer.step < steps:
            loss, answers = trainer.train_step()
            right = sum(one for _, one in answers) / len(answers)
            loss_average = _average(loss_average, loss)
            right_average = _average(right_average, right)
            shown = f"loss {loss_average:.3f}  right {right_average:.1%}"
            progress.update(task, completed=trainer.step, shown=shown)
            if first:
                for name, one in answers:
                    asked[name].append(one)
            if asked and trainer.step % _REPORT_STEPS == 0:
                shares = [
                    f"{name} {sum(all_) / len(all_):.0%}" for name, all_ in sorted(asked.items())
                ]
                progress.console.print(f"step {trainer.step}: {shown}: {', '.join(shares)}")
                asked.clear()
            if first and time.monotonic() - saved > save_s:
                trainer.save(output)
                saved = time.monotonic()
            if first and eval_every and trainer.step % eval_every == 0:
                _evaluate(trainer, size, progress.console)
    if first:
        trainer.save(output)


def _evaluate(trainer: Trainer, size: int, console: Console) -> None:
    """Print held-out accuracy: of clips, of windows and notes about them, and from notes alone."""
    model, tokenizer = trainer.model, trainer.tokenizer
    hears = model.config.hears
    clips = accuracy(model, tokenizer, held_out_samples(_EVAL_CLIPS, size, sound=hears))
    console.print("clips", accuracy_table(clips))
    windows = held_out_windows(_EVAL_CLIPS, size, (8, 16, 64), sound=hears)
    console.print("windows", accuracy_table(accuracy(model, tokenizer, windows)))
    for kind, (precision, recall) in note_scores(model, tokenizer, windows).items():
        console.print(f"{kind}s in notes: precision {precision:.1%}, recall {recall:.1%}")
    notes = held_out_notes(_EVAL_CLIPS, size, (2, 6, 10, 15, 20))
    console.print("notes", accuracy_table(accuracy(model, tokenizer, notes, [(1, 1)])))


def _towers(model: ComposerForConditionalGeneration, steps: int, seed: int) -> None:
    with Progress(
        *Progress.get_default_columns(),
        TextColumn("{task.fields[shown]}"),
        console=_console,
        disable=rank() > 0,
    ) as progress:
        task = progress.add_task("towers", total=steps, shown="")

        def report(step: int, shares: dict[str, float]) -> None:
            shown = "  ".join(f"{name} {share:.0%}" for name, share in shares.items())
            progress.update(task, completed=step + 1, shown=shown)

        train_towers(model, steps, seed, report)


def _average(before: float | None, now: float) -> float:
    return now if before is None else 0.98 * before + 0.02 * now


def _device(wanted: Device) -> torch.device:
    if wanted is Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no CUDA device", param_hint="--device")
    return torch.device(wanted.value)


def _fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by the hardware rather than emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


if __name__ == "__main__":
    app()
