"""The responses of a session that are under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vllm_mm_ext.live.client_events import ResponseRequest
from vllm_mm_ext.live.effects import Abort, Effect, Respond, ResponseOptions, Send, Usage, sends
from vllm_mm_ext.live.live_conversation import Asked, LiveConversation, new_id
from vllm_mm_ext.live.live_response import LiveResponse
from vllm_mm_ext.live.session_items import Item
from vllm_mm_ext.live.session_options import SessionOptions
from vllm_mm_ext.live.wire_error import WireError

# Responses at once that are not of the conversation; each holds a prompt.
_MOST_OUTSIDE = 4


class ActiveResponses:
    """Responses under way: at most one of the conversation, and a few outside it.

    What the engine tells of a response that is over changes nothing.

    Args:
        conversation: Takes the answers.
    """

    def __init__(self, conversation: LiveConversation) -> None:
        self._conversation = conversation
        self._active: dict[str, LiveResponse] = {}

    @property
    def writing(self) -> LiveResponse | None:
        """The response of the conversation."""
        return next((x for x in self._active.values() if x.in_conversation), None)

    @property
    def any(self) -> bool:
        """Whether a response is under way, of the conversation or not."""
        return bool(self._active)

    @property
    def nbytes(self) -> int:
        """Bytes held for responses alone: their own inputs."""
        return sum(x.nbytes for x in self._active.values())

    def check_room(self, request: ResponseRequest) -> None:
        """Look whether another response can begin.

        Raises:
            WireError: Too many are under way.
        """
        writing = self.writing
        if request.in_conversation and writing is not None:
            raise WireError(
                "Conversation already has an active response in progress: "
                f"{writing.response_id}. Wait until the response is finished before creating a "
                "new one.",
                code="conversation_already_has_active_response",
            )
        outside = sum(not x.in_conversation for x in self._active.values())
        if not request.in_conversation and outside >= _MOST_OUTSIDE:
            raise WireError(
                f"{outside} responses outside the conversation are in progress, the most there "
                "can be. Wait until one is finished.",
                code="too_many_active_responses",
            )

    def create(
        self, request: ResponseRequest, asked: Asked, options: SessionOptions
    ) -> list[Effect]:
        """Begin a response; an answer of the conversation has its place from now on."""
        answer = Item(new_id("item"), "assistant", status="in_progress", added=False)
        items = None
        if request.in_conversation:
            items = self._conversation.items
            items.append(answer)
        limit = request.max_output_tokens or options.max_output_tokens
        response = LiveResponse(
            new_id("resp"),
            answer,
            items,
            self._conversation.conversation_id,
            limit,
            request.metadata,
            asked.nbytes,
        )
        self._active[response.response_id] = response
        temperature = options.temperature
        if request.temperature is not None:
            temperature = request.temperature
        how = ResponseOptions(None if limit == "inf" else limit, temperature)
        aside = (
            not request.in_conversation
            or request.input is not None
            or request.instructions is not None
        )
        return [
            Send(response.created()),
            Respond(response.response_id, asked.prompt, how, aside, request.in_conversation),
        ]

    def cancel(
        self, response_id: str | None, reason: Literal["turn_detected", "client_cancelled"]
    ) -> list[Effect]:
        """Break a response off; None: the one of the conversation.

        Raises:
            WireError: There is no such response under way.
        """
        if response_id is None and (writing := self.writing) is not None:
            response_id = writing.response_id
        response = self._active.pop(response_id or "", None)
        if response is None:
            raise WireError(
                "Cancellation failed: no active response found",
                code="response_cancel_not_active",
            )
        return [
            Abort(response.response_id),
            *sends(response.cancel(reason, self._conversation.scales)),
        ]

    def wrote(
        self, response_id: str, token_ids: Sequence[int], text: str, usage: Usage
    ) -> list[Effect]:
        """The engine wrote more of a response; ``usage``: up to here."""
        response = self._active.get(response_id)
        return [] if response is None else sends(response.write(token_ids, text, usage))

    def ended(self, response_id: str, cut: bool, usage: Usage) -> list[Effect]:
        """The engine ended a response; ``cut``: at its limit of tokens."""
        response = self._active.pop(response_id, None)
        if response is None:
            return []
        return sends(response.complete(cut, usage, self._conversation.scales))

    def failed(self, response_id: str, error_type: str, code: str, message: str) -> list[Effect]:
        """The engine could not write a response to its end."""
        response = self._active.pop(response_id, None)
        if response is None:
            return []
        return sends(response.fail(error_type, code, message, self._conversation.scales))

    def end_all(self, code: str, message: str) -> list[Effect]:
        """The session ends, and with it what is under way."""
        effects: list[Effect] = []
        for response_id in list(self._active):
            effects.append(Abort(response_id))
            effects += self.failed(response_id, "server_error", code, message)
        return effects
