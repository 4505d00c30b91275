"""The chat completion that asks a model one thing, and what its answer says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_mm_ext.config.options import (
    NO_REDUCTION,
    Floor,
    Reduction,
    RequestOptions,
    TrainedReductions,
)
from vllm_mm_ext.config.quality_settings import BoundSettings
from vllm_mm_ext.long_video.asking import Ask, Look

# Past every reduction that a model learns.
_ANY_REDUCTION = Reduction(pool=8, temporal=8)
# Alternatives of a token whose probability vLLM reports by default.
_MOST_LOGPROBS = 20
# What stands before a token's id in vLLM's answer.
_TOKEN_ID = "token_id:"
# What of a client's request holds for each prompt made for it. The other fields are about the
# answer.
_KEPT = (
    "model",
    "cache_salt",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
)


def request_for(
    ask: Ask, client: Any, url: str | None, *, session: str | None, priority: int
) -> Any:
    """vLLM's request for one prompt.

    Args:
        ask: The prompt.
        client: The client's request.
        url: URL of the video that the prompt shows; None for a prompt of text alone.
        session: Session of the client's request.
        priority: Of the prompt.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    content: list[dict[str, Any]] = [{"type": "text", "text": text} for text in ask.texts]
    if url is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": url}})
    kept = {name: value for name in _KEPT if (value := getattr(client, name)) is not None}
    return ChatCompletionRequest(
        **kept,
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=1 if ask.choices else ask.max_tokens,
        temperature=0.0,
        session_id=session,
        priority=priority,
    )


def restrict(request: Any, choices: Sequence[Sequence[int]], max_logprobs: int) -> None:
    """Let a request's answer be one token, the first one of a choice, with its probability.

    Args:
        request: vLLM's request; it is changed.
        choices: Ids of the first tokens of each choice.
        max_logprobs: The server's limit on reported alternatives; -1 for none.
    """
    most = _MOST_LOGPROBS if max_logprobs < 0 else min(max_logprobs, _MOST_LOGPROBS)
    request.allowed_token_ids = sorted({token for ids in choices for token in ids})
    request.logprobs = True
    request.top_logprobs = most
    request.return_tokens_as_token_ids = True


def chances(choices: Mapping[str, Sequence[int]], logprobs: Any) -> dict[str, float]:
    """Probability of each choice, of 1 for all of them together.

    vLLM reports the probabilities of the tokens that the model finds likely, and of the one that
    was written, which is the likeliest of those that were allowed. A token of which nothing is
    reported has at most the least of the reported probabilities, and counts with that.

    Args:
        choices: Ids of the first tokens of each choice.
        logprobs: vLLM's log-probabilities of the one token that was written.
    """
    reported = {logprobs.token: logprobs.logprob}
    reported |= {top.token: top.logprob for top in logprobs.top_logprobs}
    least = min(reported.values())
    # Relative to the largest, so that the sum is not zero.
    most = max(reported.get(f"{_TOKEN_ID}{i}", least) for ids in choices.values() for i in ids)
    weights = {
        choice: sum(math.exp(reported.get(f"{_TOKEN_ID}{i}", least) - most) for i in ids)
        for choice, ids in choices.items()
    }
    whole = sum(weights.values())
    return {choice: weight / whole for choice, weight in weights.items()}


def first_tokens(tokenizer: Any, choices: Sequence[str]) -> dict[str, list[int]]:
    """Ids of the tokens with which a reply may begin that is one of the choices.

    Args:
        tokenizer: The model's.
        choices: Words; each also counts with a capital letter.

    Raises:
        ValueError: Two choices begin with the same token, so they cannot be told apart.
    """
    found: dict[str, list[int]] = {}
    taken: dict[int, str] = {}
    for choice in choices:
        forms = dict.fromkeys((choice, choice[:1].upper() + choice[1:]))
        ids = [tokenizer.encode(form, add_special_tokens=False)[:1] for form in forms]
        found[choice] = sorted({i for first in ids for i in first})
        for token in found[choice]:
            if token in taken:
                raise ValueError(
                    f"{taken[token]!r} and {choice!r} begin with the same token of this model"
                )
            taken[token] = choice
    return found


def options_for(
    look: Look | None,
    client: RequestOptions,
    bounds: BoundSettings,
    trained: TrainedReductions | None,
) -> RequestOptions:
    """The options of a prompt about a window.

    Args:
        look: How closely the model looks; None without a window.
        client: Options of the client's request. Those about the number of frames and tokens of a
            whole video do not hold for a window.
        bounds: The server's bounds; a look that the server's settings ask for stays within them.
        trained: Reductions that the model learned, if it did; a coarse look takes the strongest.
    """
    if look is None:
        return RequestOptions()
    reduction = client.reduction
    if look.kind == "coarse" and trained is not None:
        reduction = trained.towards(NO_REDUCTION, _ANY_REDUCTION)
    return client.model_copy(
        update={
            "fps": None if look.fps is None else min(look.fps, bounds.max_fps),
            "min_frames": None,
            "max_frames": None
            if look.max_frames is None
            else min(look.max_frames, bounds.max_frames),
            "total_tokens": None,
            "reduction": reduction,
            "floor": Floor(),
            "long_video": None,
        }
    )
