"""The training loop: deterministic by seed, resumable at any saved step."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from vllm_mm_ext.composer.configuration import ARCHITECTURE
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.batches import (
    Batch,
    encode_media,
    read_text,
    right_answers,
)
from vllm_mm_ext.composer.training.muon import Muon
from vllm_mm_ext.composer.training.perception import PerceptionHeads
from vllm_mm_ext.composer.training.processes import average_gradients, world

logger = logging.getLogger(__name__)
_STATE = "training_state.pt"
# Of the loss on what is known of notes; it stays, as right answers need it to the end.
_NOTES_WEIGHT = 0.4
Batches = Callable[[int], Batch]
"""Batch of a step."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Of the whole training, resumed parts included.
        seed: Decides weights, clips and order.
        lr: Highest learning rate.
        warmup: Steps until it is reached.
        decay: Share of the steps, at the end, over which it falls to zero (linearly).
        weight_decay: Of matrices, decoupled.
        clip: Largest norm of the gradient.
        perception_steps: Steps over which the weight of `perception`'s loss falls to zero; it
            concerns generated clips only.
        projectors_only: Towers and text model stay as they are.
        freeze_towers: The encoders stay as they are from here on.
        autocast: Compute in bfloat16 where that is safe; weights stay float32.
    """

    steps: int
    seed: int = 0
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    perception_steps: int = 0
    projectors_only: bool = False
    freeze_towers: bool = False
    autocast: bool = False

    def perception_weight(self, step: int) -> float:
        """Weight of the loss of `perception` at a step."""
        return max(0.0, 1 - step / self.perception_steps) if self.perception_steps else 0.0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * rising * min(1.0, left)


class Trainer:
    """Model, optimizer and where they are.

    Args:
        model: Float32, on the device to train on.
        tokenizer: Saved beside the model.
        recipe: How to train.
        batches: Batch of a step; the same for the same step whenever it is asked.
        data: What the batches follow from, besides the seed and the model; a training is resumed
            with the same alone.
    """

    def __init__(
        self,
        model: ComposerForConditionalGeneration,
        tokenizer: Any,
        recipe: Recipe,
        batches: Batches,
        data: Mapping[str, str | int] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.recipe, self._batches = model, tokenizer, recipe, batches
        self._data = dict(data or {})
        self.step = 0
        self.device = next(model.parameters()).device
        # What transformers loads computes without the dropout of its config, until told to train.
        model.train()
        for name, parameter in model.named_parameters():
            trained = name.split(".")[0].endswith("_projector") or not recipe.projectors_only
            # Whisper's positions are sinusoids and stay.
            parameter.requires_grad_(trained and not name.endswith("embed_positions.weight"))
        torch.manual_seed(recipe.seed)
        self.heads = PerceptionHeads(model.config).to(self.device)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizers = _optimizers(model, recipe, self.heads)
        if recipe.freeze_towers:
            # Their optimizer state stays, so that a training can be resumed with and without them.
            for name, parameter in model.named_parameters():
                if name.split(".")[0].endswith("_tower"):
                    parameter.requires_grad_(False)

    def train_step(self) -> tuple[float, list[tuple[str, bool]]]:
        """One step: its loss, and for each question its task and whether the answer was right."""
        batch = self._batches(self.step).to(self.device)
        rate = self.recipe.rate(self.step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)
        context = (
            torch.autocast(self.device.type, torch.bfloat16)
            if self.recipe.autocast
            else nullcontext()
        )
        with context:
            media = encode_media(self.model, batch)
            states, logits, labels = read_text(self.model, batch, media)
        answers_loss = F.cross_entropy(logits.float(), labels)
        loss = answers_loss
        weight = self.recipe.perception_weight(self.step)
        if weight and all(sample.clip is not None for sample in batch.samples):
            loss = loss + weight * self.heads(batch, media, states)
        if batch.marks:
            loss = loss + _NOTES_WEIGHT * self.heads.notes(batch, states)
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"the loss of step {self.step} is not finite")
        self.model.zero_grad(set_to_none=True)
        self.heads.zero_grad(set_to_none=True)
        loss.backward()
        if world() > 1:
            average_gradients([*self._trained, *self.heads.parameters()])
        torch.nn.utils.clip_grad_norm_(self._trained, self.recipe.clip)
        for optimizer in self._optimizers:
            optimizer.step()
        self.step += 1
        return float(answers_loss.detach()), right_answers(batch, logits.detach())

    def save(self, directory: Path) -> None:
        """Write the checkpoint and the state that `resume` takes; old ones stay until replaced."""
        save_checkpoint(self.model, self.tokenizer, directory)
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "step": self.step,
            "recipe": asdict(self.recipe),
            "data": self._data,
        }
        new = directory / (_STATE + ".new")
        torch.save(state, new)
        os.replace(new, directory / _STATE)

    def resume(self, directory: Path) -> None:
        """Go on where `save` left off. Steps, rates and their schedule are those of the recipe.

        Raises:
            FileNotFoundError: Nothing was saved there.
            ValueError: It was saved with another seed, other trained parts, other data or another
                ``config.json``.
        """
        state = torch.load(directory / _STATE, map_location=self.device, weights_only=True)
        own = asdict(self.recipe)
        pairs = [(key, state["recipe"][key], own[key]) for key in ("seed", "projectors_only")]
        if "data" in state:
            pairs += [(key, state["data"].get(key), now) for key, now in self._data.items()]
        else:
            logger.warning("what %s was trained on is not in its state and not compared", directory)
        for key, before, now in pairs:
            if before != now:
                raise ValueError(f"the saved training has {key} {before}, this one has {now}")
        try:
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
        except RuntimeError as error:
            raise ValueError(
                f"the saved weights do not fit the model of {directory / 'config.json'}; a changed "
                "one is trained with --init, into another directory"
            ) from error
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["step"])


def _optimizers(
    model: ComposerForConditionalGeneration, recipe: Recipe, heads: PerceptionHeads
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for matrices of hidden layers; AdamW for embeddings, the output head and all else."""
    hidden: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    vectors: list[torch.Tensor] = []
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if parameter.ndim == 2 and isinstance(module, torch.nn.Linear):
                own = any(parameter is end for end in ends)
                (others if own else hidden).append(parameter)
            else:
                (others if parameter.ndim > 1 else vectors).append(parameter)
    rest = [
        {"params": list(dict.fromkeys(others)), "weight_decay": recipe.weight_decay},
        {"params": [*vectors, *heads.parameters()], "weight_decay": 0.0},
    ]
    return (
        Muon(hidden, lr=recipe.lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), fused=True),
    )


def saved_rate(directory: Path) -> float:
    """Highest learning rate of the training that was saved there."""
    state = torch.load(directory / _STATE, mmap=True, map_location="cpu", weights_only=True)
    return float(state["recipe"]["lr"])


def has_state(directory: Path) -> bool:
    """Whether a training was saved there."""
    return (directory / _STATE).is_file()


def save_checkpoint(
    model: ComposerForConditionalGeneration,
    tokenizer: Any,
    directory: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint directory that transformers and vLLM load.

    Args:
        model: What to save.
        tokenizer: With its chat template.
        directory: Made if missing.
        dtype: Of the weights in the file; None: as they are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model.save_pretrained(directory, state_dict=weights)
    # transformers writes class and type of the model in memory.
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [ARCHITECTURE]
    config["dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"processor_class": "ComposerProcessor"}, indent=2) + "\n"
    )
