"""What the planner knows of a model: sizes read from its configuration, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TextFacts:
    """The text model.

    Attributes:
        layers: Transformer layers, each with a KV cache.
        hidden: Width of the residual stream, also of the embeddings that encoders deliver.
        intermediate: Width of an MLP; of one expert in a mixture of experts.
        heads, kv_heads: Attention heads of queries, and of keys and values.
        head_dim: Width of a head.
        vocabulary: Number of logits.
        experts, experts_per_token: Of a mixture of experts; 0 otherwise.
        parameters: All parameters of the text model, with embedding and output head.
        active_parameters: Parameters that one token is multiplied with: without the embedding
            table, with the output head, of experts only those chosen.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int
    experts_per_token: int
    parameters: int
    active_parameters: int


@dataclass(frozen=True)
class EncoderFacts:
    """A vision or an audio encoder, with what projects its outputs.

    Attributes:
        modality: What the encoder takes.
        layers, hidden, intermediate, heads: Of its transformer.
        parameters: All its parameters.
        input_values: Values of one input: of a patch of pixels (with its frames), or of the mel
            frames behind one position of the audio transformer.
        inputs_per_output: Transformer positions that become one output (merged patches).
        output_width: Values of one output as the encoder cache keeps it; more than ``hidden`` of
            the text model where features of several layers go along (Qwen3-VL).
        attention_span: Positions that attend to each other; 0: all of an image, a temporal patch
            or a window.
        gated: Its MLPs have a gate beside the two usual matrices.
        divided_bytes: Bytes of its weights that the GPUs of a replica divide among themselves.
        divides_heads: The GPUs of a replica divide its heads, and cannot share the model if the
            heads do not divide.
    """

    modality: Literal["vision", "audio"]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    parameters: int
    input_values: int
    inputs_per_output: int
    output_width: int
    attention_span: int = 0
    gated: bool = False
    divided_bytes: int = 0
    divides_heads: bool = True


@dataclass(frozen=True)
class ModelFacts:
    """A model as the planner sees it.

    Attributes:
        name: Model or path as the user gave it.
        architecture: vLLM's name of the architecture.
        family: The module of its processor (``qwen2_5_vl``, ``composer``); ``stock`` for others.
        dtype_bytes: Bytes of a weight and of an activation.
        weight_bytes: Bytes of all weights.
        text: The text model.
        vision, audio: The encoders; None where the model has none.
        max_context: Most tokens of a request that the model supports.
        kv_dtype_bytes: Bytes of one value in the KV cache.
        dtype: Name of the type of weights and activations.
        whole_bytes: Bytes of weights that each GPU holds whole.
        expert_bytes: Bytes of the experts of a mixture of experts, which all GPUs of all replicas
            divide among themselves.
        quantization: vLLM's name of how weights are quantised; empty if they are not.
    """

    name: str
    architecture: str
    family: str
    dtype_bytes: int
    weight_bytes: int
    text: TextFacts
    vision: EncoderFacts | None
    audio: EncoderFacts | None
    max_context: int
    kv_dtype_bytes: int
    dtype: str = "bfloat16"
    whole_bytes: int = 0
    expert_bytes: int = 0
    quantization: str = ""

    def undivided(self, tp: int, dp: int = 1) -> str:
        """Why GPUs cannot share the model: heads or widths that do not divide; empty if they can.

        Args:
            tp: GPUs of a replica.
            dp: Replicas.
        """
        text = self.text
        if text.heads % tp:
            return f"the model has {text.heads} attention heads, which must be divisible by it"
        if text.kv_heads % tp and tp % text.kv_heads:
            return f"the model has {text.kv_heads} KV heads, of which one must divide the other"
        for encoder in (self.vision, self.audio):
            if encoder is None:
                continue
            name = f"the {encoder.modality} encoder"
            if encoder.divides_heads and encoder.heads % tp:
                return f"{name} has {encoder.heads} attention heads, which must be divisible by it"
            # An audio encoder is divided in all its layers or, where heads do not divide, in none.
            divides = encoder.modality == "vision" or encoder.divides_heads
            if divides and encoder.intermediate % tp:
                return (
                    f"the MLPs of {name} are {encoder.intermediate} wide, which must be divisible "
                    "by it"
                )
        shared = tp * dp if text.experts else tp
        if text.intermediate % shared:
            name = "experts" if text.experts else "MLPs"
            return f"the {name} are {text.intermediate} wide, which must be divisible by {shared}"
        return ""

    def weights_per_gpu(self, tp: int, dp: int = 1) -> int:
        """Bytes of the weights on each GPU.

        Args:
            tp: GPUs of a replica.
            dp: Replicas.
        """
        whole = self.whole_bytes
        if self.audio is not None and self.audio.heads % tp:
            # Where its heads do not divide, each GPU has all of the audio encoder.
            whole += self.audio.divided_bytes
        divided = self.weight_bytes - whole - self.expert_bytes
        return whole + divided // tp + self.expert_bytes // (tp * dp)

    def kv_heads_per_gpu(self, tp: int) -> int:
        """KV heads that each of ``tp`` GPUs holds; below one per GPU they are repeated."""
        return max(1, self.text.kv_heads // tp)

    def kv_bytes_per_token(self, tp: int = 1) -> int:
        """Bytes of keys and values of one token on each of ``tp`` GPUs, over all layers."""
        text = self.text
        per_layer = 2 * self.kv_heads_per_gpu(tp) * text.head_dim * self.kv_dtype_bytes
        return per_layer * text.layers
