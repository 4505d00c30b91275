"""The engine as live sessions use it: what its model takes in, and sessions on it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.live.engine_parts import Engine, EngineListener
from vllm_mm_ext.adapters.live.engine_session import EngineSession, aside_of, new_salt
from vllm_mm_ext.adapters.live.families import UnsupportedModelError, family_of
from vllm_mm_ext.adapters.live.live_prompt import PromptMaker
from vllm_mm_ext.adapters.live.refusals import UnknownModelError
from vllm_mm_ext.adapters.live.served_template import reasoning_of, renderer_of
from vllm_mm_ext.adapters.live.template_pieces import TemplateError, take_apart
from vllm_mm_ext.adapters.placeholder_wrappers import placeholders_of
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.prompt import Message
from vllm_mm_ext.live.reasoning import Reasoning
from vllm_mm_ext.policies.kv.control import KVClient, NoBlockPoolError

__all__ = ["EngineSession", "LiveEngine", "LiveUnavailableError", "UnknownModelError"]

logger = vllm_compat.logger


class LiveUnavailableError(Exception):
    """The served model cannot hold live sessions; the message says why."""


class LiveEngine:
    """What live sessions need of the engine and its model; one for each API server.

    Attributes:
        traits: What the model takes in.
        context_tokens: Most tokens of a prompt and its answer together.
        pinned: Sessions whose media the engine keeps.
    """

    def __init__(
        self,
        engine_client: Any,
        chat: Any,
        models: Any,
        maker: PromptMaker,
        reasoning: Reasoning | None,
    ) -> None:
        self.pinned = 0
        self.traits: FamilyTraits = maker.family.traits
        self._models = models
        settings = vllm_compat.settings_of(engine_client.model_config)
        # One core is enough for putting prompts together.
        threads = ThreadPoolExecutor(1, "mm-ext-live")
        self._engine = Engine(engine_client, chat, maker, threads, reasoning, settings.sight.page)
        self.context_tokens = self._engine.context_tokens
        self._kv = KVClient(engine_client) if settings.kv.enabled else None
        self._of_rank: Counter[int] = Counter()

    @classmethod
    async def start(cls, engine_client: Any, state: Any) -> LiveEngine:
        """Look at the served model.

        Args:
            engine_client: vLLM's ``AsyncLLM``.
            state: State of vLLM's application, after vLLM has filled it.

        Raises:
            LiveUnavailableError: The model cannot hold live sessions.
        """
        chat = getattr(state, "openai_serving_chat", None)
        if chat is None:
            raise LiveUnavailableError("live sessions need a model that generates text")
        model_config, renderer = engine_client.model_config, engine_client.renderer
        processor, tokenizer = renderer.mm_processor, renderer.get_tokenizer()
        settings = vllm_compat.settings_of(model_config)
        if not engine_client.vllm_config.cache_config.enable_prefix_caching:
            logger.warning(
                "mm_ext: prefix caching is off: a live session computes all that it has heard and "
                "seen again with every unit"
            )
        try:
            family = family_of(model_config, processor, settings)
            tokens = {kind: tokenizer.decode([one]) for kind, one in family.token_ids.items()}
            pieces = take_apart(renderer_of(chat, model_config, tokenizer), tokens)
            reasoning = reasoning_of(tokenizer, begun=pieces.opens_reasoning)
        except (UnsupportedModelError, TemplateError) as error:
            raise LiveUnavailableError(str(error)) from error

        def encode(text: str) -> Sequence[int]:
            ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)
            return ids

        maker = PromptMaker(pieces, family, encode, tokens, placeholders_of(processor))
        return cls(engine_client, chat, state.openai_serving_models, maker, reasoning)

    def measure(self, message: Message) -> int:
        """Prompt tokens of a message, with those that begin and end it.

        Raises:
            WireError: The model does not take one of its pictures.
        """
        return self._engine.maker.measure(message)

    async def open(
        self, session_id: str, listener: EngineListener, *, model: str | None = None
    ) -> EngineSession:
        """Begin a session on one engine.

        Args:
            session_id: Unique in the service.
            listener: Is told what becomes of the session's prompts.
            model: Served model or LoRA adapter; None: the served model.

        Raises:
            UnknownModelError: There is no such model.
        """
        await self._adapter(model)
        salt = new_salt()
        pinned = await self._pin(session_id, salt)
        rank = self._rank()
        self.pinned += pinned

        async def trim() -> None:
            if pinned:
                await self._let_go(session_id, salt, trims=True)

        async def leave() -> None:
            if rank is not None:
                self._of_rank[rank] -= 1
            if pinned:
                self.pinned -= 1
                await self._let_go(session_id, salt)

        adapter = partial(self._adapter, model)
        return EngineSession(self._engine, session_id, listener, adapter, rank, salt, trim, leave)

    async def _pin(self, session_id: str, salt: str) -> bool:
        """Let the engine keep the session's media; False where it cannot."""
        if self._kv is None:
            return False
        try:
            await self._kv.pin(session_id, salt)
        except NoBlockPoolError:
            # The server has said so when it started.
            return False
        except Exception as error:
            logger.warning("mm_ext: the KV of a live session is not pinned: %s", error)
            return False
        return True

    async def _let_go(self, session_id: str, salt: str, *, trims: bool = False) -> None:
        """Release a session's KV, or all but that of the conversation's latest prompt."""
        assert self._kv is not None
        act, what = (self._kv.trim, "old KV") if trims else (self._kv.release, "the KV")
        try:
            # Both go to the engine before either is answered, as nobody waits long for a slow one.
            # The answers aside first: what comes before cached pieces is kept with them.
            await asyncio.gather(
                self._kv.release(aside_of(session_id), salt), act(session_id, salt)
            )
        except Exception as error:
            logger.warning("mm_ext: %s of a live session is not released: %s", what, error)

    async def _adapter(self, model: str | None) -> Any:
        """The LoRA adapter of a name as vLLM's chat requests find it; None for the served model."""
        from vllm import envs
        from vllm.lora.request import LoRARequest

        models = self._models
        if not model or models.is_base_model(model) or envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
            return models.lora_requests.get(model)
        if model in models.lora_requests:
            return models.lora_requests[model]
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            found = await models.resolve_lora(model)
            if isinstance(found, LoRARequest):
                return found
        raise UnknownModelError(f"The model `{model}` does not exist.")

    def _rank(self) -> int | None:
        """The data-parallel engine with the fewest sessions of this server; None of one engine.

        Of those with as few, each API server begins with another one.
        """
        parallel = self._engine.client.vllm_config.parallel_config
        count: int = parallel.data_parallel_size
        if parallel.local_engines_only:
            count = parallel.data_parallel_size_local
        if count < 2:
            return None
        first: int = max(0, parallel._api_process_rank) * count // parallel._api_process_count
        rank = min(range(first, first + count), key=lambda one: self._of_rank[one % count]) % count
        self._of_rank[rank] += 1
        return rank
