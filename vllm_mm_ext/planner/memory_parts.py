"""Memory of an engine and of an API server: each part with what it follows from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_mm_ext.planner.gpu_facts import GIB, Site
from vllm_mm_ext.planner.model_facts import EncoderFacts, ModelFacts
from vllm_mm_ext.planner.request_tokens import MediumTokens, RequestTokens
from vllm_mm_ext.planner.workload import Workload

# What the sampler makes of a row of logits: as they come, as float32, and a sorted or masked copy.
_LOGIT_BYTES = 2 + 4 + 4
_AUDIO_SAMPLE_BYTES = 4
_AUDIO_RATE = 16_000
# Not measured by the planner: a CUDA context with its libraries, and CUDA graphs; with several GPUs
# the buffers of NCCL as well. vLLM measures them when it starts.
_CUDA_BYTES = round(1.6 * GIB)
_NCCL_BYTES = round(1.0 * GIB)
# What a core and a worker on a CPU load and allocate for their first requests, beside the process
# that has loaded vLLM, and for their first sound (``vllm-mm bench plan-memory``).
_ENGINE_GROWTH = 150 << 20
_ENGINE_SOUND = 50 << 20
# What the processor holds of an input as it makes it: float32, twice while patches are cut, and
# what is sent.
PREPROCESSING_COPIES = 5
# Made-up media beside their copy in a tensor, of which a part is being resized; and what becomes of
# them, as float32.
_MADE_UP_COPIES, _WARMED_COPIES = 2.5, 2


@dataclass(frozen=True)
class Part:
    """A part of the memory of a process or a GPU.

    Attributes:
        name: What holds it.
        num_bytes: How much.
        why: What it follows from.
    """

    name: str
    num_bytes: int
    why: str


@dataclass(frozen=True)
class Step:
    """What bounds one step of an engine.

    Attributes:
        tokens: ``--max-num-batched-tokens``.
        sequences: ``--max-num-seqs``.
        encoder_tokens: Embeddings that one step encodes at most, and that the device tier of the
            encoder cache holds.
        encoder_inputs: Patches of one forward of the vision encoder
            (``compression.encoder_max_patches``), or 0 for no bound.
    """

    tokens: int
    sequences: int
    encoder_tokens: int
    encoder_inputs: int


def total(parts: Iterable[Part]) -> int:
    """Bytes of all parts."""
    return sum(part.num_bytes for part in parts)


def encoder_peak(
    encoder: EncoderFacts, inputs: int, dtype_bytes: int, *, layers_kept: int = 1
) -> int:
    """Bytes that a forward of an encoder holds at most beside weights, inputs and outputs.

    One layer makes of each position: two norms, queries, keys and values, what attention and its
    projection leave, the MLP's inner and outer values; 12 times the width with an MLP of 4 times
    the width. vLLM's inference frees a layer's before the next layer's.

    Args:
        encoder: The encoder.
        inputs: Positions in the forward.
        dtype_bytes: Bytes of a value.
        layers_kept: Layers whose values are held at a time; all of them where autograd keeps them.
    """
    inner = (3 if encoder.gated else 1) * encoder.intermediate
    return inputs * layers_kept * (8 * encoder.hidden + inner) * dtype_bytes


def text_peak(facts: ModelFacts, step: Step, tp: int, dp: int = 1) -> int:
    """Bytes that a forward of the text model over a full step holds beside weights and KV.

    Args:
        facts: The model.
        step: The largest step.
        tp: GPUs that share the model.
        dp: Replicas, which share the experts.
    """
    text = facts.text
    heads = (text.heads + 2 * text.kv_heads) * text.head_dim // tp
    inner = 3 * text.intermediate // tp
    if text.experts_per_token:
        # A GPU's share of the experts gets the tokens of all replicas.
        inner = text.experts_per_token * (inner + dp * text.hidden)
        inner += dp * text.hidden if dp > 1 else 0
    # The residual, its norm, the embeddings of the step, and the wider one of attention and MLP.
    per_token = 3 * text.hidden + max(heads + text.hidden, inner + text.hidden)
    logits = step.sequences * text.vocabulary * _LOGIT_BYTES
    return step.tokens * per_token * facts.dtype_bytes + logits


def encoder_step_peak(facts: ModelFacts, request: RequestTokens, step: Step) -> int:
    """Bytes of the encoders' inputs and values in the largest step.

    Args:
        facts: The model.
        request: One request, whose items tell how many inputs are behind an embedding.
        step: The largest step.
    """
    most = 0
    for encoder in (facts.vision, facts.audio):
        if encoder is None:
            continue
        inputs = _step_inputs(encoder, request, step)
        at_once = inputs
        if encoder.modality == "vision" and step.encoder_inputs:
            at_once = min(inputs, step.encoder_inputs)
        held = inputs * encoder.input_values * facts.dtype_bytes
        most = max(most, held + encoder_peak(encoder, at_once, facts.dtype_bytes))
    return most


def warm_up_peak(
    facts: ModelFacts, request: RequestTokens, step: Step, made_up: int, largest_item: int
) -> int:
    """Bytes that vLLM's warm-up of the processor takes at most.

    An API server and, on a CPU, an engine do it before they serve.

    Args:
        facts: The model.
        request: One request, whose items tell how many inputs are behind an embedding.
        step: The largest step.
        made_up: Bytes of the pictures and samples that vLLM makes up for it.
        largest_item: Embeddings of the largest of these.
    """
    inputs = 0
    for encoder in (facts.vision, facts.audio):
        if encoder is not None:
            largest = replace(step, encoder_tokens=largest_item)
            inputs = max(inputs, _values(encoder, _step_inputs(encoder, request, largest)))
    return round(_MADE_UP_COPIES * made_up) + _WARMED_COPIES * inputs * facts.dtype_bytes


def _step_inputs(encoder: EncoderFacts, request: RequestTokens, step: Step) -> int:
    """Inputs of an encoder in a step that encodes as many embeddings as it may."""
    is_audio = encoder.modality == "audio"
    ratios = []
    for item in request.items:
        joint = item.modality != "audio"
        heard, made = (item.audio_inputs, item.audio_outputs) if joint else (0, 0)
        if is_audio and not joint:
            heard, made = item.encoder_inputs, item.embeddings
        seen = 0 if item.modality == "audio" else item.encoder_inputs - item.audio_inputs
        left = item.embeddings - (item.audio_outputs if joint else item.embeddings)
        inputs, outputs = (heard, made) if is_audio else (seen, left)
        if outputs:
            ratios.append(inputs / outputs)
    return round(step.encoder_tokens * max(ratios, default=0.0))


def encoder_cache_bytes(facts: ModelFacts, embeddings: int) -> int:
    """Bytes of so many embeddings in a tier of the encoder cache."""
    widths = [one.output_width for one in (facts.vision, facts.audio) if one is not None]
    return embeddings * max(widths, default=facts.text.hidden) * facts.dtype_bytes


@dataclass(frozen=True)
class RequestBytes:
    """Bytes of one request in an API server.

    Attributes:
        files: The encoded files.
        decoded: Frames and sound as they leave the decoder.
        inputs: Inputs of the encoders, which vLLM's processor cache keeps.
    """

    files: int
    decoded: int
    inputs: int


def request_bytes(facts: ModelFacts, workload: Workload, request: RequestTokens) -> RequestBytes:
    """Bytes of one request in an API server."""
    files = sum(video.file_bytes for video in workload.videos)
    decoded = 0
    for medium in request.media:
        sound = round(medium.audio_seconds * _AUDIO_RATE) * _AUDIO_SAMPLE_BYTES
        files += sound if medium.kind == "audio" else 0
        decoded += frame_bytes(medium) + sound
    inputs = 0
    for item in request.items:
        heard = item.encoder_inputs if item.modality == "audio" else item.audio_inputs
        seen = item.encoder_inputs - heard
        inputs += _values(facts.vision, seen) + _values(facts.audio, heard)
    return RequestBytes(files, decoded, inputs * facts.dtype_bytes)


def frame_bytes(medium: MediumTokens) -> int:
    """Bytes of the decoded frames of a video; 0 of another medium."""
    width, height = medium.size
    return medium.stages.sampled * width * height * 3 if medium.kind == "video" else 0


def _values(encoder: EncoderFacts | None, inputs: int) -> int:
    return 0 if encoder is None else inputs * encoder.input_values


def engine_parts(
    facts: ModelFacts,
    site: Site,
    workload: Workload,
    request: RequestTokens,
    step: Step,
    warm_up: int,
) -> tuple[Part, ...]:
    """Memory of each GPU, or of the engine's processes on a CPU, without the KV cache.

    Args:
        facts: The model.
        site: The machine.
        workload: What is asked of the server.
        request: One request.
        step: The largest step.
        warm_up: Most bytes that vLLM's warm-up of the processor takes.
    """
    encoders = encoder_step_peak(facts, request, step)
    parts = [
        Part(
            "weights",
            facts.weights_per_gpu(site.tp, site.dp),
            "parameters and buffers as loaded",
        ),
        Part(
            "text model, one step",
            text_peak(facts, step, site.tp, site.dp),
            f"{step.tokens:,} tokens and the logits of {step.sequences} sequences",
        ),
        Part(
            "encoders, one step",
            encoders,
            f"up to {step.encoder_tokens:,} embeddings, {step.encoder_inputs:,} patches at a time",
        ),
        Part(
            "encoder cache, device tier",
            encoder_cache_bytes(facts, step.encoder_tokens),
            f"{step.encoder_tokens:,} embeddings",
        ),
    ]
    if not site.gpu.is_cpu:
        allowance = _CUDA_BYTES + (_NCCL_BYTES if site.tp > 1 else 0)
        return (*parts, Part("CUDA", allowance, "an allowance: context, libraries, graphs"))
    each = request_bytes(facts, workload, request)
    return (
        *parts,
        Part(
            "Python and vLLM, twice",
            2 * site.process_bytes + _ENGINE_GROWTH + (_ENGINE_SOUND if request.has_sound else 0),
            "the engine's core and its worker; and what their first request loads",
        ),
        Part(
            "vLLM's warm-up",
            max(0, warm_up - encoders),
            "before it serves, where the encoders take less",
        ),
        Part(
            "encoder cache, host tier",
            encoder_cache_bytes(facts, request.embeddings * step.sequences),
            "media of all requests that run",
        ),
        Part(
            "inputs of encoders",
            each.inputs * step.sequences,
            "vLLM's processor cache, media of all requests that run",
        ),
        Part(
            "the same at the worker",
            each.inputs * step.sequences,
            "a worker keeps what it is sent until a request ends",
        ),
    )
