"""What a simulated replica has room for, and what media cost it: by the planner's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_mm_ext.planner.host_work import host_work
from vllm_mm_ext.planner.memory_parts import encoder_cache_bytes, request_bytes
from vllm_mm_ext.planner.model_facts import ModelFacts
from vllm_mm_ext.planner.plan import Plan
from vllm_mm_ext.planner.rates import Rates
from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.step_contents import encoder_work, inputs_of
from vllm_mm_ext.planner.workload import Workload


@dataclass(frozen=True)
class MediumCosts:
    """One kind of medium.

    Attributes:
        tokens: What it adds to the prompt.
        items: Its mm items (segments).
        encode_s: Seconds of engine steps that encoding all of it takes.
        output_bytes: Bytes of its encoder outputs.
        decoded_bytes: Bytes of its frames and sound.
        decode_s: Seconds of decode workers: probe and decode.
        preprocess_s: Seconds of the preprocessing thread.
        main_s: Seconds of the API server's main thread when it is first seen...
        again_s: ...and when its frames are cached.
        inputs_s: Seconds of the step in which a request with it begins, encoded or not.
    """

    tokens: int
    items: int
    encode_s: float
    output_bytes: int
    decoded_bytes: int
    decode_s: float
    preprocess_s: float
    main_s: float
    again_s: float
    inputs_s: float

    @classmethod
    def of(
        cls, facts: ModelFacts, workload: Workload, request: RequestTokens, rates: Rates
    ) -> MediumCosts:
        """The media of a request, as one medium.

        Args:
            facts: The model.
            workload: What the client sends.
            request: What becomes of it.
            rates: What work costs.
        """
        step, host = rates.step, rates.host
        encode_s = sum(
            step.items
            + step.vision * item.vision
            + step.vision_pairs * item.vision_pairs
            + step.audio * item.audio
            for item in encoder_work(request)
        )
        inputs = inputs_of(encoder_work(request))
        works = host_work(workload, request)
        return cls(
            tokens=request.prompt - request.text,
            items=max(1, len(request.items)),
            encode_s=encode_s,
            output_bytes=max(1, encoder_cache_bytes(facts, request.embeddings)),
            decoded_bytes=max(1, request_bytes(facts, workload, request).decoded),
            decode_s=sum(work.probe_s(host) + work.decode_s(host) for work in works),
            preprocess_s=sum(work.preprocess_s(host) for work in works),
            main_s=sum(work.main_s(host) for work in works),
            again_s=sum(work.cached_s(host) for work in works),
            inputs_s=step.inputs * inputs,
        )


@dataclass(frozen=True)
class ReplicaShape:
    """A replica: an engine with its API server.

    Attributes:
        kv_blocks, block_size: Its KV cache.
        device_bytes, host_bytes: Tiers of its encoder cache.
        decoded_bytes: Decoded media that the API server keeps.
        decode_workers: Decodes at a time.
        slots: ``--max-num-seqs``.
        step_tokens: ``--max-num-batched-tokens``.
        hidden_size: Of the language model.
        rates: What work costs.
        cores: Cores of the machine that the engine and its API server have.
    """

    kv_blocks: int
    block_size: int
    device_bytes: int
    host_bytes: int
    decoded_bytes: int
    decode_workers: int
    slots: int
    step_tokens: int
    hidden_size: int
    rates: Rates
    cores: float

    @classmethod
    def of(cls, plan: Plan, rates: Rates) -> ReplicaShape:
        """A replica as it is planned.

        Args:
            plan: Of one replica.
            rates: What work costs.
        """
        return cls(
            kv_blocks=plan.kv_blocks,
            block_size=plan.block_size,
            device_bytes=plan.encoder_cache_bytes,
            host_bytes=plan.host_tier_bytes,
            decoded_bytes=plan.front.decoded_mb << 20,
            decode_workers=plan.front.workers,
            slots=plan.step.sequences,
            step_tokens=plan.step.tokens,
            hidden_size=plan.facts.text.hidden,
            rates=rates,
            cores=max(1, plan.site.cores // plan.site.dp),
        )
