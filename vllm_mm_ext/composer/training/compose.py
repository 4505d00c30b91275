"""A composer from three released checkpoints.

Run as ``python -m vllm_mm_ext.composer.training.compose``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, WhisperConfig
from transformers.models.siglip import SiglipVisionConfig, SiglipVisionModel
from transformers.models.whisper.modeling_whisper import WhisperModel

from vllm_mm_ext.composer.configuration import (
    SPECIAL_TOKENS,
    STATES_PER_SECOND,
    ComposerConfig,
)
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.tokenizer import (
    ASSISTANT,
    CHATML_TEMPLATE,
    END,
    OWN_TEMPLATE,
    SYSTEM,
    USER,
)
from vllm_mm_ext.composer.training.trainer import save_checkpoint

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def compose(
    vision: Path,
    text: Path,
    audio: Path | None,
    *,
    reductions: list[dict[str, int]],
    audio_stack: int = 4,
    timestamps: bool = False,
    seed: int = 0,
) -> tuple[ComposerForConditionalGeneration, Any]:
    """A composer with the towers and the text model of three checkpoints and fresh projectors.

    The tokens of media are added to the tokenizer, and the embeddings grow to hold them; new rows
    are the mean of the old ones, so that they stand out in no direction.

    Args:
        vision: Directory of a SigLIP or of its vision model.
        text: Directory of a text model with its tokenizer.
        audio: Directory of a Whisper; None for a composer without sound.
        reductions: As in `ComposerConfig`.
        audio_stack: Encoder frames per token of sound.
        timestamps: Times are written before groups of frames.
        seed: Decides the projectors.

    Returns:
        Model in float32, and tokenizer with a chat template that shows media.

    Raises:
        ValueError: A checkpoint is of another kind, or the configuration cannot be.
    """
    _check_text(text)
    tokenizer = AutoTokenizer.from_pretrained(text)
    language_model = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    _prepare(tokenizer)
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    audio_config = None if audio is None else _config(audio, "whisper")
    config = ComposerConfig(
        text_config=language_model.config,
        vision_config=_vision_config(vision),
        audio_config=audio_config,
        reductions=reductions,
        audio_window_s=_window_s(audio_config),
        audio_stack=audio_stack,
        timestamps=timestamps,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL_TOKENS.items()},
    )
    torch.manual_seed(seed)
    model = ComposerForConditionalGeneration(config)
    model.language_model = language_model
    # Heads and text towers of the source are left behind.
    model.vision_tower = SiglipVisionModel.from_pretrained(
        vision, config=config.vision_config, dtype=torch.float32
    )
    if audio is not None:
        model.audio_tower = WhisperModel.from_pretrained(audio, dtype=torch.float32).encoder
    return model, tokenizer


def _prepare(tokenizer: Any) -> None:
    """Add the tokens of media, and a chat template that shows media.

    Tokenizers of chat models that know ChatML keep it; others get tokens for roles as well.
    """
    added = list(SPECIAL_TOKENS.values())
    if "<|im_start|>" in tokenizer.get_vocab():
        tokenizer.chat_template = CHATML_TEMPLATE
    else:
        added += [SYSTEM, USER, ASSISTANT, END]
        tokenizer.chat_template = OWN_TEMPLATE
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.eos_token = END if END in added else "<|im_end|>"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _check_text(directory: Path) -> None:
    config = AutoConfig.from_pretrained(directory).get_text_config()
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise ValueError(
            f"{directory.name} holds a {config.model_type}, which has embeddings of each token in "
            "every layer; the tokens of media have none"
        )


def _config(directory: Path, model_type: str) -> Any:
    config = AutoConfig.from_pretrained(directory)
    if config.model_type != model_type:
        raise ValueError(f"{directory.name} holds a {config.model_type}, not a {model_type}")
    return config


def _vision_config(directory: Path) -> SiglipVisionConfig:
    config = AutoConfig.from_pretrained(directory)
    config = getattr(config, "vision_config", config)
    if config.model_type != "siglip_vision_model":
        raise ValueError(f"{directory.name} holds a {config.model_type}, not a SigLIP")
    config.vision_use_head = False
    return config


def _window_s(audio: WhisperConfig | None) -> float:
    return 30.0 if audio is None else audio.max_source_positions / STATES_PER_SECOND


def _reductions(given: list[str]) -> list[dict[str, int]]:
    found = []
    for text in given:
        pool, _, temporal = text.partition("x")
        if not (pool.isdecimal() and temporal.isdecimal()):
            raise typer.BadParameter(
                f"{text!r} is not POOLxTEMPORAL, such as 2x4", param_hint="--reduction"
            )
        found.append({"pool": int(pool), "temporal": int(temporal)})
    return found


@app.command()
def main(
    output: Annotated[Path, typer.Argument(help="Directory of the composer to write.")],
    vision: Annotated[Path, typer.Option(help="Directory of a SigLIP.", exists=True)],
    text: Annotated[Path, typer.Option(help="Directory of a text model.", exists=True)],
    audio: Annotated[
        Path | None, typer.Option(help="Directory of a Whisper; without it: no sound.", exists=True)
    ] = None,
    reduction: Annotated[
        list[str] | None,
        typer.Option(help="POOLxTEMPORAL to support besides none; may be given several times."),
    ] = None,
    audio_stack: Annotated[
        int, typer.Option(min=1, help="Encoder frames of 20 ms that become one token.")
    ] = 4,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Write times before groups of frames.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides the projectors' weights.")] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16/--fp32", help="Type of the weights written.")
    ] = True,
) -> None:
    """Assemble a composer, ready to train and to serve: towers, text model, fresh projectors."""
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} is not empty", param_hint="OUTPUT")
    pairs = _reductions(["2x1", "1x4", "2x4"] if reduction is None else reduction)
    try:
        model, tokenizer = compose(
            vision,
            text,
            audio,
            reductions=pairs,
            audio_stack=audio_stack,
            timestamps=timestamps,
            seed=seed,
        )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    save_checkpoint(model, tokenizer, output, torch.bfloat16 if bf16 else torch.float32)
    typer.echo(f"wrote {output}: projectors are untrained, see scripts/train_composer")


if __name__ == "__main__":
    app()
