"""What the sessions of an API server share, and whom each of them tells what it does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vllm_mm_ext.adapters.live.live_prompt import PromptMaker
from vllm_mm_ext.live.effects import TurnEnd, Usage
from vllm_mm_ext.live.reasoning import Reasoning

# vLLM's least bias of a token: it is never sampled.
_NEVER = -100.0


class EngineListener(Protocol):
    """Is told what becomes of a session's prompts; called on the event loop, never reentrantly."""

    def appended(self, tokens: int | None, computed: int, turn_end: TurnEnd | None) -> None:
        """An append has ended.

        Args:
            tokens: Of the prompt; None if the engine refused it (the next response says why).
            computed: Of these, those that were not in KV.
            turn_end: What the model says of the pause; None where it was not asked or cannot tell.
        """

    def wrote(self, response_id: str, token_ids: tuple[int, ...], text: str, usage: Usage) -> None:
        """The answer goes on; the token that ends it is not among the ids.

        Args:
            response_id: The response.
            token_ids: What was written since the last time.
            text: The same as text.
            usage: Up to here.
        """

    def ended(self, response_id: str, reason: Literal["stop", "length"], usage: Usage) -> None:
        """The answer is whole, or as long as it may be."""

    def failed(self, response_id: str | None, error_type: str, code: str, message: str) -> None:
        """A response failed; without a response, the engine or the session's model is gone."""


@dataclass(frozen=True)
class Engine:
    """What the sessions of an API server share.

    Attributes:
        client: vLLM's ``AsyncLLM``.
        chat: vLLM's handler of chat completions, which has the server's defaults of sampling.
        maker: Makes prompts.
        threads: Where prompts are put together.
        reasoning: How the model sets reasoning apart from its answers, if it does.
        remembers: Sessions remember the hashes of their mm items, for takedowns.
    """

    client: Any
    chat: Any
    maker: PromptMaker
    threads: ThreadPoolExecutor
    reasoning: Reasoning | None = None
    remembers: bool = False

    @property
    def context_tokens(self) -> int:
        """Most tokens of a prompt and its answer together."""
        length: int = self.client.model_config.max_model_len
        return length

    def never_written(self) -> dict[str, Any]:
        """Sampling parameters by which an answer has no token that stands for a medium."""
        # With a drafter vLLM takes no bias; a bias costs less, as it asks for no earlier tokens.
        if self.client.vllm_config.speculative_config is not None:
            return {"bad_words": list(self.maker.token_texts.values())}
        return {"logit_bias": dict.fromkeys(self.maker.family.token_ids.values(), _NEVER)}
