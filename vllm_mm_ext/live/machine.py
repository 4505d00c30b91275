"""The state of one live session: events in, events and work for the engine out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, ParamSpec

from vllm_mm_ext.live import server_events
from vllm_mm_ext.live.active_responses import ActiveResponses
from vllm_mm_ext.live.client_events import (
    AudioAppend,
    AudioClear,
    AudioCommit,
    ClientEvent,
    ItemCreate,
    ItemDelete,
    ItemRetrieve,
    ItemTruncate,
    ResponseCancel,
    ResponseCreate,
    ResponseRequest,
    SessionUpdate,
    VideoAppend,
    media_contents,
)
from vllm_mm_ext.live.effects import Append, Close, Effect, Send, TurnEnd, Usage, sends
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.listening import Heard
from vllm_mm_ext.live.live_conversation import LiveConversation
from vllm_mm_ext.live.new_items import Media, check_lengths, check_media, no_media
from vllm_mm_ext.live.open_message import LEAST_SOUND_MS, Change, Grew, Paused, Started, Stopped
from vllm_mm_ext.live.prompt import Message
from vllm_mm_ext.live.server_events import Event
from vllm_mm_ext.live.session_options import (
    SemanticVad,
    SessionLimits,
    SessionOptions,
    default_options,
    shown,
    updated,
)
from vllm_mm_ext.live.session_timers import SessionTimers
from vllm_mm_ext.live.watching import Sight
from vllm_mm_ext.live.wire_error import WireError

_P = ParamSpec("_P")
# WebSocket's close code for a client that went past a limit.
_POLICY = 1008


class SessionMachine:
    """One live session. Pure: times are arguments, in monotonic seconds.

    Every method returns what is to be done, in order. What a client does wrong becomes an ``error``
    event. After a ``Close``, or after ``closed``, nothing is left to do and nothing is kept.

    Args:
        session_id: Names the session (``sess_...``).
        model: The served model's name.
        family: What the model takes.
        limits: What the session may use.
        measure: Tokens of a message of a prompt.
        now: When the session begins.
        expires_at: When it ends at the latest, in seconds since 1970.
    """

    def __init__(
        self,
        session_id: str,
        model: str,
        family: FamilyTraits,
        limits: SessionLimits,
        measure: Callable[[Message], int],
        now: float,
        expires_at: int,
    ) -> None:
        self.options: SessionOptions = default_options(model, family, limits)
        self._session_id = session_id
        self._family = family
        self._limits = limits
        self._expires_at = expires_at
        self._conversation = LiveConversation(
            family, limits, measure, self.options.turn_detection, now
        )
        self._responses = ActiveResponses(self._conversation)
        # What is to be appended when no response is being written.
        self._grew = False
        self._paused = False
        self._timers = SessionTimers(limits, now)
        self._closed = False

    # What the client does.

    def start(self, now: float) -> list[Effect]:
        """The first effects: ``session.created``."""
        self._timers.event(now)
        return [Send(server_events.session_event("session.created", self._shown()))]

    def admit(self, event: ClientEvent) -> None:
        """Look at the media and texts of an event before they are decoded or tokenized.

        Raises:
            WireError: The model does not take such media, or so long a text; nothing else is to be
                done with the event.
        """
        try:
            if isinstance(event, AudioAppend) and not self._family.hears:
                raise no_media("audio", "sound")
            if isinstance(event, VideoAppend) and not self._family.sees:
                raise no_media("image", "frames")
            check_media(event, self._family)
            check_lengths(event, self._limits.prompt_tokens)
        except WireError as error:
            error.event_id = event.event_id
            raise

    def handle(self, event: ClientEvent, now: float, media: Sequence[Media] = ()) -> list[Effect]:
        """Take any event but appended sound and frames.

        Args:
            event: What the client sent, admitted.
            now: Monotonic seconds.
            media: Those of ``media_contents(event)``, decoded, in their order.
        """
        assert len(media) == len(media_contents(event))
        if self._closed:
            return []
        self._timers.event(now)
        try:
            effects = self._take(event, now, media)
        except WireError as error:
            error.event_id = event.event_id
            effects = _error(error)
        return effects + self._settle()

    def heard(self, heard: Heard, now: float) -> list[Effect]:
        """Take the sound of an append, or what the listener flushed for a commit."""
        if self._closed:
            return []
        self._timers.event(now)
        return self._follow(self._conversation.open.hear(heard, now), now)

    def seen(self, sight: Sight, now: float) -> list[Effect]:
        """Take a camera frame."""
        if self._closed:
            return []
        self._timers.event(now)
        return self._follow(self._conversation.open.see(sight, now), now)

    def refused(self, error: WireError, now: float) -> list[Effect]:
        """Tell the client of an event that could not be read, admitted or decoded."""
        if self._closed:
            return []
        self._timers.event(now)
        return _error(error)

    # What the engine does.

    def wrote(
        self, response_id: str, token_ids: Sequence[int], text: str, usage: Usage, now: float
    ) -> list[Effect]:
        """The engine wrote more of a response; ``usage``: up to here."""
        self._timers.event(now)
        return self._responses.wrote(response_id, token_ids, text, usage)

    def ended(
        self, response_id: str, reason: Literal["stop", "length"], usage: Usage, now: float
    ) -> list[Effect]:
        """The engine ended a response."""
        return self._end(now, self._responses.ended, response_id, reason == "length", usage)

    def failed(
        self, response_id: str, error_type: str, code: str, message: str, now: float
    ) -> list[Effect]:
        """The engine could not write a response, or not to its end."""
        return self._end(now, self._responses.failed, response_id, error_type, code, message)

    def appended(self, turn_end: TurnEnd | None, now: float) -> list[Effect]:
        """An ``Append`` ended.

        Args:
            turn_end: What the model says of the pause, if it was asked.
            now: Monotonic seconds.
        """
        if self._closed or turn_end is None:
            return []
        stopped = self._conversation.open.turn_ended(turn_end)
        return [] if stopped is None else self._follow(iter((stopped,)), now)

    # What time does.

    def deadline(self) -> float | None:
        """When ``tick`` has something to do, in monotonic seconds; None: never."""
        if self._closed:
            return None
        ends = self._timers.next(self.options.turn_detection, responding=self._responses.any)
        unit_ends = self._conversation.open.deadline()
        return ends if unit_ends is None else min(ends, unit_ends)

    def tick(self, now: float) -> list[Effect]:
        """Do what was to be done by now."""
        if self._closed:
            return []
        if (why := self._timers.over(now, responding=self._responses.any)) is not None:
            return self._close(*why)
        effects = self._follow(self._conversation.open.pass_time(now), now)
        silent_from = self._timers.silent_from(now, self.options.turn_detection)
        if silent_from is not None:
            effects += self._prompt_user(silent_from, now)
        self._grew |= self._timers.unasked(now)
        return effects + self._settle()

    def closed(self) -> None:
        """The socket is gone: forget everything."""
        self._responses.end_all("session_closed", "The client closed the session.")
        self._forget()

    # One event of the client.

    def _take(self, event: ClientEvent, now: float, media: Sequence[Media]) -> list[Effect]:
        conversation = self._conversation
        match event:
            case SessionUpdate():
                return self._update(event)
            case AudioCommit():
                conversation.check_commit()
                return self._commit(now)
            case AudioClear():
                self._grew = self._paused = False
                return sends(conversation.clear())
            case ItemCreate():
                self._timers.committed(now)
                return sends(conversation.create(event, media))
            case ItemRetrieve():
                return sends(conversation.retrieve(event))
            case ItemDelete():
                return sends(conversation.delete(event))
            case ItemTruncate():
                return sends(conversation.truncate(event))
            case ResponseCreate():
                return self._respond(event, media)
            case ResponseCancel():
                return self._end(now, self._responses.cancel, event.response_id, "client_cancelled")
        raise AssertionError(event)

    def _update(self, event: SessionUpdate) -> list[Effect]:
        options = updated(self.options, event.session, self._family, self._limits)
        if options.instructions != self.options.instructions:
            self._conversation.set_instructions(options.instructions)
        if options.turn_detection != self.options.turn_detection:
            self._conversation.open.detect(options.turn_detection)
        self.options = options
        return [Send(server_events.session_event("session.updated", self._shown()))]

    def _commit(self, now: float) -> list[Effect]:
        self._timers.committed(now)
        self._grew = self._paused = False
        return sends(self._conversation.commit())

    # Speech.

    def _follow(self, changes: Iterator[Change], now: float) -> list[Effect]:
        """Deal with what sound, frames or time change, one by one."""
        effects: list[Effect] = []
        changed = False
        for change in changes:
            changed = True
            match change:
                case Started(at_ms):
                    effects += self._speech_started(at_ms, now)
                case Paused():
                    self._paused = True
                    effects += self._settle()
                case Stopped(at_ms):
                    effects += self._speech_stopped(at_ms, now)
                case Grew():
                    self._grew = True
            if self._closed:
                break
        # Most sound only makes the open unit longer, which is not worth a look at the limits.
        return effects + self._settle() if changed else effects

    def _speech_started(self, at_ms: int, now: float) -> list[Effect]:
        self._timers.spoken()
        event = server_events.speech_started(at_ms, self._conversation.speech_item)
        effects: list[Effect] = [Send(event)]
        detection = self.options.turn_detection
        if detection is not None and detection.interrupt_response and self._responses.writing:
            effects += self._end(now, self._responses.cancel, None, "turn_detected")
        return effects

    def _speech_stopped(self, at_ms: int, now: float) -> list[Effect]:
        event = server_events.speech_stopped(at_ms, self._conversation.speech_item)
        effects = [Send(event), *self._commit(now)]
        detection = self.options.turn_detection
        if detection is not None and detection.create_response:
            effects += self._respond(None)
        return effects

    def _prompt_user(self, silent_from_ms: int, now: float) -> list[Effect]:
        """Nobody spoke for long after a response: let the model say something."""
        open_message = self._conversation.open
        if min(open_message.at_ms - silent_from_ms, open_message.silence_ms) < LEAST_SOUND_MS:
            # The microphone is off, or all was cleared; there is no silence to be heard.
            return []
        event = server_events.timeout_triggered(
            silent_from_ms, open_message.at_ms, self._conversation.speech_item
        )
        open_message.take_silence()
        effects = [Send(event), *self._commit(now), *self._respond(None)]
        return effects + self._settle()

    # Responses.

    def _respond(self, event: ResponseCreate | None, media: Sequence[Media] = ()) -> list[Effect]:
        """Answer as a client asks, or the turn that just ended; None: the latter."""
        request = ResponseRequest() if event is None else event.response
        effects: list[Effect] = []
        try:
            self._responses.check_room(request)
            # Frames since the end of a turn follow its answer, whose prompt is computed already.
            if event is not None and request.in_conversation:
                effects += sends(self._conversation.commit_frames())
            held = self._responses.nbytes
            effects += sends(self._conversation.make_room(self.options.truncation, held))
            asked = self._conversation.asked(request, media, self.options.truncation)
            self._conversation.check_bytes(held + asked.nbytes)
        except WireError as error:
            error.event_id = None if event is None else event.event_id
            return effects + _error(error)
        if request.in_conversation:
            self._timers.spoken()
            self._timers.asked()
            self._grew = self._paused = False
        return effects + self._responses.create(request, asked, self.options)

    def _end(
        self, now: float, end: Callable[_P, list[Effect]], *args: _P.args, **kwargs: _P.kwargs
    ) -> list[Effect]:
        """End a response; its events, and what follows them if it was under way."""
        writing = self._responses.writing
        if not (effects := end(*args, **kwargs)):
            return []
        self._timers.event(now)
        if writing is not self._responses.writing:
            # What came in meanwhile has waited for the answer, which stands before it.
            self._grew |= bool(self._conversation.open.parts())
            if not self._conversation.open.speaking:
                self._timers.response_ended(now, self._conversation.open.at_ms)
        limit = self._limits.prompt_tokens
        left = max(0, limit - self._conversation.tokens)
        return [*effects, Send(server_events.rate_limits_updated(limit, left)), *self._settle()]

    # What is to be done after whatever happened.

    def _settle(self) -> list[Effect]:
        """Keep within the limits, and let the engine compute what is new."""
        if self._closed:
            return []
        held = self._responses.nbytes
        effects = sends(self._conversation.make_room(self.options.truncation, held))
        try:
            self._conversation.check_bytes(held)
        except WireError as error:
            return effects + self._close(error.code, error.message)
        if (self._grew or self._paused) and self._responses.writing is None:
            effects += self._append()
            self._grew = self._paused = False
        return effects

    def _append(self) -> list[Effect]:
        """Let the engine compute the user's message so far; in a pause, as it may be answered."""
        pause = self._conversation.open.pause if self._paused else None
        paused = pause is not None
        asked = pause if isinstance(self.options.turn_detection, SemanticVad) else None
        goes_on = asked is not None or not paused
        prompt = self._conversation.open_prompt(paused=paused, goes_on=goes_on)
        return [] if prompt is None else [Append(prompt, asked)]

    def _close(self, code: str, message: str) -> list[Effect]:
        """End the session: it went past a limit."""
        effects = self._responses.end_all(code, message)
        effects += [Send(server_events.error_event(message, code=code)), Close(_POLICY, code)]
        self._forget()
        return effects

    def _forget(self) -> None:
        self._closed = True
        self._conversation.forget()

    def _shown(self) -> Event:
        return shown(self.options, self._session_id, self._expires_at)


def _error(error: WireError) -> list[Effect]:
    event = server_events.error_event(
        error.message, code=error.code, param=error.param, event_id=error.event_id
    )
    return [Send(event)]
