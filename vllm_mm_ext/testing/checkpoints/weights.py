"""Seeded random weights under which the output depends on the whole input, and saving them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Attention logits of order one give near-uniform weights, and an average over thousands of
# patches hides what one frame shows; sharper heads pick out content.
_ATTENTION_GAIN = 2.0
_QUERY_KEY = ("q_proj", "k_proj", ".q.", ".k.", "qkv")


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill a model's parameters in place from ``seed``.

    Matrices get variance-preserving normals (std = gain / sqrt(fan_in), He et al. 2015) rather
    than the usual 0.02, which at these widths would leave nothing of the input in the logits.
    Norm scales stay at 1; biases are small.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                if name.endswith("image_newline"):
                    std = 1.0
                elif name.endswith("bias"):
                    std = 0.1
                else:
                    continue
            elif id(parameter) in embeddings:
                std = 1.0 if "embed_tokens" in name else 0.2
            else:
                # Fused experts are [expert, out, in]; anything else is [out, in, *kernel].
                fan_in = parameter[0].numel() if "expert" not in name else parameter.shape[-1]
                std = fan_in**-0.5
                if any(part in name for part in _QUERY_KEY):
                    std *= _ATTENTION_GAIN
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_((noise * std).to(parameter.dtype))


def save_weights(
    model: Any,
    config: dict[str, Any],
    path: Path,
    *,
    eos: int,
    pad: int,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``generation_config.json``.

    Args:
        model: A transformers model; it writes its own checkpoint names.
        config: Contents of ``config.json``.
        path: Existing directory.
        eos, pad: Token ids.
        rename: Weight name as transformers writes it to the published checkpoint's name.
    """
    model.to(torch.bfloat16).save_pretrained(path)
    if rename is not None:
        file = path / "model.safetensors"
        weights = {rename(name): weight.clone() for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"eos_token_id": eos, "pad_token_id": pad}
    (path / "generation_config.json").write_text(json.dumps(generation) + "\n")
