"""Facts of a model, read off the very class that serves it, built without memory for weights."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_mm_ext.adapters.planning.loading import CannotPlanError, LoadedModel
from vllm_mm_ext.planner.model_facts import EncoderFacts, ModelFacts, TextFacts
from vllm_mm_ext.policies.encoder_cache.items import deepstack_levels

# The project's names of the families, by the module of their processor.
_MODULE = "vllm_mm_ext.adapters.processors."
# What configurations call the number of a mixture's experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def model_facts(name: str, loaded: LoadedModel) -> ModelFacts:
    """Build the model's class on the ``meta`` device and read sizes off it and the configuration.

    Args:
        name: Model or path as the user gave it.
        loaded: The model.

    Raises:
        CannotPlanError: vLLM cannot build the model on this machine (a quantization, for instance),
            or its layers do not all have KV of one size for every token.
    """
    config = loaded.config
    with _one_process(config):
        try:
            model = _on_meta(config)
        except Exception as error:
            raise CannotPlanError(
                f"vLLM does not build {name} on this machine: {type(error).__name__}: {error}"
            ) from error
    spec, layers = _kv_spec(name, config)
    try:
        return _facts(name, loaded, model, spec, layers)
    except (AttributeError, StopIteration) as error:
        raise CannotPlanError(
            f"{name}: its configuration lacks what the planner reads: {error}"
        ) from error


def _facts(name: str, loaded: LoadedModel, model: Any, spec: Any, layers: int) -> ModelFacts:
    model_config = loaded.config.model_config
    text_config = model_config.hf_text_config
    inner = getattr(model_config.hf_config, "thinker_config", model_config.hf_config)
    parts = _parameters(model)
    divided, experts = _divided_bytes(model), _bytes(_experts(model))
    heads = _kinds_that_divide_heads(model)
    weights = _bytes([*model.parameters(), *model.buffers()])
    text = _text_facts(text_config, model, spec, layers, parts["text"])
    width = text.hidden * (1 + deepstack_levels(model_config.hf_config))
    module = type(loaded.processor).__module__
    return ModelFacts(
        name=name,
        architecture=model_config.architecture,
        family=module.removeprefix(_MODULE) if module.startswith(_MODULE) else "stock",
        dtype_bytes=model_config.dtype.itemsize,
        weight_bytes=weights,
        text=text,
        vision=_vision_facts(
            inner,
            width,
            parts["vision"],
            gated=_is_gated(model),
            divides_heads="vision" in heads,
        ),
        audio=_audio_facts(
            inner, text.hidden, parts["audio"], divided["audio"], divides_heads="audio" in heads
        ),
        max_context=int(model_config.max_model_len),
        kv_dtype_bytes=spec.dtype.itemsize,
        dtype=str(model_config.dtype).removeprefix("torch."),
        whole_bytes=weights - experts - sum(divided.values()),
        expert_bytes=experts,
        quantization=str(model_config.quantization or ""),
    )


@contextmanager
def _one_process(config: Any) -> Iterator[None]:
    """Give vLLM the one-process group that building its layers asks for."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        address = (Path(folder) / "group").as_uri()
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


@contextmanager
def _own_rotary_embeddings() -> Iterator[None]:
    """Keep rotary embeddings without data out of the ones that vLLM shares between its models."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    shared = dict(_ROPE_DICT)
    _ROPE_DICT.clear()
    try:
        yield
    finally:
        _ROPE_DICT.clear()
        _ROPE_DICT.update(shared)


def _on_meta(config: Any) -> Any:
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = set_default_torch_dtype(config.model_config.dtype)
    with dtype, _own_rotary_embeddings(), torch.device("meta"):
        return initialize_model(config)


def _kv_spec(name: str, config: Any) -> tuple[Any, int]:
    """What the KV cache of every layer is like, and how many layers have one."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    layers = config.compilation_config.static_forward_context.values()
    found = [
        layer.get_kv_cache_spec(config) for layer in layers if hasattr(layer, "get_kv_cache_spec")
    ]
    specs = [spec for spec in found if spec is not None]
    # Latent attention, windows and states of Mamba are kinds of their own.
    kinds = {type(spec) for spec in specs}
    if kinds == {FullAttentionSpec}:
        sizes = {(spec.num_kv_heads, spec.head_size, spec.dtype) for spec in specs}
        if len(sizes) == 1:
            return specs[0], len(specs)
    shown = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
    raise CannotPlanError(
        f"{name}: plans are for models whose layers all keep keys and values of one size for every "
        f"token; the layers of this one have {shown}"
    )


def _text_facts(config: Any, model: Any, spec: Any, layers: int, parameters: int) -> TextFacts:
    experts = next((int(count) for name in _EXPERTS if (count := getattr(config, name, 0))), 0)
    if not experts and _experts(model):
        raise CannotPlanError(
            f"the model has experts, of which its config.json has no number ({', '.join(_EXPERTS)})"
        )
    chosen = int(getattr(config, "num_experts_per_tok", 0) or 0) if experts else 0
    of_experts = sum(parameter.numel() for parameter in _experts(model))
    table = int(config.vocab_size) * int(config.hidden_size)
    # Tied embeddings are one matrix, which is the output head as well.
    tied = bool(getattr(config, "tie_word_embeddings", False))
    dense = parameters - of_experts - (0 if tied else table)
    return TextFacts(
        layers=layers,
        hidden=int(config.hidden_size),
        intermediate=int(
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        ),
        heads=int(config.num_attention_heads),
        kv_heads=int(spec.num_kv_heads),
        head_dim=int(spec.head_size),
        vocabulary=int(config.vocab_size),
        experts=experts,
        experts_per_token=chosen,
        parameters=parameters,
        active_parameters=dense + (of_experts * chosen // experts if experts else 0),
    )


def _parameters(model: Any) -> dict[str, int]:
    """Parameters of the text model, of the vision encoder and of the audio encoder."""
    counts = {"text": 0, "vision": 0, "audio": 0}
    for name, parameter in model.named_parameters():
        counts[_kind(name)] += parameter.numel()
    return counts


def _experts(model: Any) -> list[torch.nn.Parameter]:
    """The weights of a mixture's experts."""
    return [weight for name, weight in model.named_parameters() if ".experts." in name]


def _divided_bytes(model: Any) -> dict[str, int]:
    """Bytes of weights that the GPUs of a replica divide, by the part of the model.

    Other weights (of convolutions, norms, and of encoders that are not vLLM's own) each GPU has
    whole; experts are counted by themselves.
    """
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    layers = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
    found: dict[str, dict[int, torch.Tensor]] = {"text": {}, "vision": {}, "audio": {}}
    for name, module in model.named_modules():
        if isinstance(module, layers):
            # Tied embeddings are one weight.
            found[_kind(name)].update((id(one), one) for one in module.parameters(recurse=False))
    return {kind: _bytes(weights.values()) for kind, weights in found.items()}


def _kinds_that_divide_heads(model: Any) -> set[str]:
    """The parts of the model whose attention heads the GPUs of a replica divide.

    InternVL's vision encoder and the audio encoders of another library have attention of plain
    layers, which each GPU has whole.
    """
    from vllm.model_executor.layers.linear import QKVParallelLinear

    return {
        _kind(name)
        for name, module in model.named_modules()
        if isinstance(module, QKVParallelLinear)
    }


def _kind(parameter: str) -> str:
    """To which part of the model a parameter or a module belongs, by the name of the part."""
    first = parameter.partition(".")[0]
    if "audio" in first:
        return "audio"
    words = ("visual", "vision", "image", "multi_modal", "video")
    return "vision" if any(word in first for word in words) else "text"


def _is_gated(model: Any) -> bool:
    names = [name for name, _ in model.named_parameters() if _kind(name) == "vision"]
    return any("gate_up" in name or "gate_proj" in name for name in names)


def _vision_facts(
    config: Any, width: int, parameters: int, *, gated: bool, divides_heads: bool
) -> EncoderFacts | None:
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    patch = _side(vision.patch_size)
    temporal = int(getattr(vision, "temporal_patch_size", 1))
    hidden = int(vision.hidden_size)
    merge = int(getattr(vision, "spatial_merge_size", 1))
    window = int(getattr(vision, "window_size", 0) or 0)
    return EncoderFacts(
        modality="vision",
        layers=int(_first(vision, "depth", "num_hidden_layers")),
        hidden=hidden,
        intermediate=int(vision.intermediate_size),
        heads=int(_first(vision, "num_heads", "num_attention_heads")),
        parameters=parameters,
        input_values=3 * temporal * patch**2,
        inputs_per_output=merge**2,
        output_width=width,
        attention_span=(window // patch) ** 2 if window else 0,
        gated=gated,
        divides_heads=divides_heads,
    )


def _audio_facts(
    config: Any, width: int, parameters: int, divided_bytes: int, *, divides_heads: bool
) -> EncoderFacts | None:
    audio = getattr(config, "audio_config", None)
    if audio is None:
        return None
    # Whisper's convolutions halve the mel frames; Qwen3-Omni's make an eighth of them.
    mel = 8 if hasattr(audio, "downsample_hidden_size") else 2
    per_output = 1 if mel == 8 else int(getattr(config, "audio_stack", 2))
    return EncoderFacts(
        modality="audio",
        layers=int(audio.encoder_layers),
        hidden=int(audio.d_model),
        intermediate=int(audio.encoder_ffn_dim),
        heads=int(audio.encoder_attention_heads),
        parameters=parameters,
        input_values=mel * int(audio.num_mel_bins),
        inputs_per_output=per_output,
        output_width=width,
        divided_bytes=divided_bytes,
        # Qwen3-Omni's is whole on each GPU where its heads do not divide.
        divides_heads=divides_heads and mel != 8,
    )


def _side(patch: Any) -> int:
    return int(patch[0] if isinstance(patch, list | tuple) else patch)


def _first(config: Any, *names: str) -> Any:
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(math.prod(one.shape) * one.element_size() for one in tensors)
