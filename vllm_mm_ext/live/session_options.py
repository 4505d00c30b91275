"""The options of a live session: what ``session.update`` may change, and how a client sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_mm_ext.live.audio_format import AudioFormat
from vllm_mm_ext.live.event_fields import EventFields
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.wire_error import WireError

Eagerness = Literal["low", "medium", "high", "auto"]
_EAGERNESS: dict[str, Eagerness] = {
    "low": "low", "medium": "medium", "high": "high", "auto": "auto"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerVad:
    """Turns end with a silence."""

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    idle_timeout_ms: int | None = None
    create_response: bool = True
    interrupt_response: bool = True


@dataclass(frozen=True, slots=True)
class SemanticVad:
    """Turns end when the model thinks so, or after a long silence."""

    eagerness: Eagerness = "auto"
    create_response: bool = True
    interrupt_response: bool = True


TurnDetection = ServerVad | SemanticVad


@dataclass(frozen=True, slots=True)
class RetentionRatio:
    """Truncation that keeps a part of what fits.

    Attributes:
        ratio: Of the limit, what stays when old turns are dropped.
        token_limit: Tokens of the conversation at most, instructions aside; None: what fits.
    """

    ratio: float
    token_limit: int | None


Truncation = Literal["auto", "disabled"] | RetentionRatio


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """The options of a session.

    Attributes:
        model: The served model's name.
        max_output_tokens: "inf": as many as fit.
        turn_detection: None: the client commits turns itself.
        truncation: "auto": the oldest turns go when the conversation is too long; "disabled": a
            response to a conversation that is too long is refused.
        temperature: This plugin's field ``mm_ext.temperature``; None: the server's default.
    """

    model: str
    instructions: str
    max_output_tokens: int | Literal["inf"]
    audio_format: AudioFormat
    turn_detection: TurnDetection | None
    truncation: Truncation
    temperature: float | None


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What the server and the model grant a session.

    Attributes:
        prompt_tokens: Tokens of a prompt at most.
        context_tokens: Tokens of a prompt and its answer at most.
        answer_tokens: Tokens of an answer at most, unless the client asks for others.
        keep_frames: Latest frames that stay in the context.
        max_bytes: Bytes of messages, sound and frames at most.
        idle_timeout_s: Seconds without an event after which the session ends.
        max_session_s: Seconds after which the session ends.
        no_voice: Why there is no voice detector; None where there is one.
    """

    prompt_tokens: int
    context_tokens: int
    answer_tokens: int
    keep_frames: int
    max_bytes: int
    idle_timeout_s: float
    max_session_s: float
    no_voice: str | None


def default_options(model: str, family: FamilyTraits, limits: SessionLimits) -> SessionOptions:
    """The options of a session before its client says anything."""
    detects = family.hears and limits.no_voice is None
    return SessionOptions(
        model=model,
        instructions="",
        max_output_tokens=limits.answer_tokens,
        audio_format=AudioFormat.PCM16,
        turn_detection=ServerVad() if detects else None,
        truncation="auto",
        temperature=None,
    )


def updated(
    options: SessionOptions,
    session: Mapping[str, Any],
    family: FamilyTraits,
    limits: SessionLimits,
) -> SessionOptions:
    """The options after a ``session.update``; what it does not name stays.

    Raises:
        WireError: A field is unknown, unsupported or has a value that cannot be.
    """
    fields = EventFields(session, "session")
    kind = fields.required("type", fields.text("type", choices=("realtime", "transcription")))
    if kind == "transcription":
        raise WireError(
            "Transcription sessions are not supported here; 'session.type' must be 'realtime'.",
            code="unsupported_parameter",
            param="session.type",
        )
    model = fields.text("model")
    if model not in (None, options.model):
        raise WireError(
            f"The model of a session cannot change; it is '{options.model}'.",
            code="cannot_update_model",
            param="session.model",
        )
    refuse_unsupported(fields)
    fields.unsupported("include", "Input is not transcribed.")
    fields.unsupported("tracing", "Nothing is traced.")
    options = replace(
        options,
        **given(
            instructions=fields.text("instructions"),
            max_output_tokens=read_max_output_tokens(fields, limits.context_tokens),
            truncation=_truncation(fields),
            temperature=read_temperature(fields),
        ),
    )
    if (audio := fields.object("audio")) is not None:
        options = _with_audio(options, audio, family, limits)
    fields.end()
    return options


def refuse_unsupported(fields: EventFields) -> None:
    """Refuse what neither a session nor a response can have here: all but text without tools."""
    modalities = fields.array("output_modalities")
    if modalities is not None and modalities != ["text"]:
        raise WireError(
            "Only text is written here: 'output_modalities' must be ['text'].",
            code="unsupported_parameter",
            param=fields.name("output_modalities"),
        )
    tools = "There are no tools."
    fields.unsupported("tools", tools)
    fields.unsupported("tool_choice", tools, off=("auto", "none"))
    fields.unsupported("parallel_tool_calls", tools)
    fields.unsupported("prompt", "Give instructions in its place.")
    fields.unsupported("reasoning", "The model writes as its chat template has it.")


def read_max_output_tokens(fields: EventFields, most: int) -> int | Literal["inf"] | None:
    """The field ``max_output_tokens``; None without it."""
    value = fields.take("max_output_tokens")
    if value is None:
        return None
    if value == "inf":
        return "inf"
    name = fields.name("max_output_tokens")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise WireError(
            f"Invalid '{name}': {str(value)[:40]}. Expected a number from 1 to {most}, or 'inf'.",
            param=name,
        )
    return value


def read_temperature(fields: EventFields) -> float | None:
    """This plugin's field ``mm_ext.temperature``; None without it."""
    if (extension := fields.object("mm_ext")) is None:
        return None
    temperature = extension.number("temperature", 0.0, 2.0)
    extension.end()
    return temperature


def given(**values: Any) -> dict[str, Any]:
    """Those values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _with_audio(
    options: SessionOptions, audio: EventFields, family: FamilyTraits, limits: SessionLimits
) -> SessionOptions:
    audio.unsupported("output", "Only text is written here.")
    if (heard := audio.object("input")) is not None:
        heard.unsupported("transcription", "The model itself hears; nothing is transcribed.")
        heard.unsupported("noise_reduction", "Sound is heard as it comes.")
        if (written := heard.object("format")) is not None:
            options = replace(options, audio_format=_audio_format(written))
        if heard.has("turn_detection"):
            detection = _turn_detection(heard, options.turn_detection, family, limits)
            options = replace(options, turn_detection=detection)
        heard.end()
    audio.end()
    return options


def _audio_format(fields: EventFields) -> AudioFormat:
    name = fields.text("type", choices=tuple(AudioFormat))
    audio_format = AudioFormat(fields.required("type", name))
    # The protocol has a rate for PCM alone.
    if audio_format is AudioFormat.PCM16:
        fields.integer("rate", audio_format.rate, audio_format.rate)
    fields.end()
    return audio_format


def _turn_detection(
    heard: EventFields, current: TurnDetection | None, family: FamilyTraits, limits: SessionLimits
) -> TurnDetection | None:
    name = heard.name("turn_detection")
    if (fields := heard.object("turn_detection")) is None:
        return None
    kind = fields.required("type", fields.text("type", choices=("server_vad", "semantic_vad")))
    detection: TurnDetection
    if not family.hears:
        raise _no_detection(name, "The model takes no sound.")
    if limits.no_voice is not None:
        raise _no_detection(name, limits.no_voice)
    if kind == "server_vad":
        detection = _server_vad(fields, current if isinstance(current, ServerVad) else ServerVad())
    elif not family.turn_end:
        raise _no_detection(
            f"{name}.type", "The model does not tell that a turn has ended; use 'server_vad'."
        )
    else:
        detection = _semantic_vad(
            fields, current if isinstance(current, SemanticVad) else SemanticVad()
        )
    fields.end()
    return detection


def _server_vad(fields: EventFields, current: ServerVad) -> ServerVad:
    # A null ends the timeout; without the field it stays.
    idle = current.idle_timeout_ms
    if fields.has("idle_timeout_ms"):
        idle = fields.integer("idle_timeout_ms", 5_000, 30_000)
    return replace(
        current,
        idle_timeout_ms=idle,
        **given(
            threshold=fields.number("threshold", 0.0, 1.0),
            prefix_padding_ms=fields.integer("prefix_padding_ms", 0, 5_000),
            silence_duration_ms=fields.integer("silence_duration_ms", 0, 10_000),
            create_response=fields.boolean("create_response"),
            interrupt_response=fields.boolean("interrupt_response"),
        ),
    )


def _semantic_vad(fields: EventFields, current: SemanticVad) -> SemanticVad:
    eagerness = fields.text("eagerness", choices=_EAGERNESS)
    return replace(
        current,
        **given(
            eagerness=None if eagerness is None else _EAGERNESS[eagerness],
            create_response=fields.boolean("create_response"),
            interrupt_response=fields.boolean("interrupt_response"),
        ),
    )


def _no_detection(name: str, why: str) -> WireError:
    return WireError(
        f"'{name}' is not supported here. {why}", code="unsupported_parameter", param=name
    )


def _truncation(fields: EventFields) -> Truncation | None:
    value = fields.take("truncation")
    if value is None:
        return None
    if value == "auto":
        return "auto"
    if value == "disabled":
        return "disabled"
    name = fields.name("truncation")
    if isinstance(value, str):
        raise WireError(
            f"Invalid value: '{value[:100]}'. Supported values are: 'auto', 'disabled', and an "
            "object of type 'retention_ratio'.",
            param=name,
        )
    ratio_fields = EventFields(value, name)
    ratio_fields.required("type", ratio_fields.text("type", choices=("retention_ratio",)))
    ratio = ratio_fields.required(
        "retention_ratio", ratio_fields.number("retention_ratio", 0.0, 1.0)
    )
    token_limit = None
    if (limits := ratio_fields.object("token_limits")) is not None:
        token_limit = limits.integer("post_instructions", 1, 1 << 24)
        limits.end()
    ratio_fields.end()
    return RetentionRatio(ratio, token_limit)


def shown(options: SessionOptions, session_id: str, expires_at: int) -> dict[str, Any]:
    """The session as ``session.created`` and ``session.updated`` show it.

    Args:
        options: Of the session.
        session_id: Its name.
        expires_at: When it ends at the latest, in seconds since 1970.
    """
    audio_format: dict[str, Any] = {"type": options.audio_format.value}
    if options.audio_format is AudioFormat.PCM16:
        audio_format["rate"] = options.audio_format.rate
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": session_id,
        "model": options.model,
        "output_modalities": ["text"],
        "instructions": options.instructions,
        "tools": [],
        "tool_choice": "auto",
        "max_output_tokens": options.max_output_tokens,
        "tracing": None,
        "prompt": None,
        "include": None,
        "truncation": _shown_truncation(options.truncation),
        "expires_at": expires_at,
        "audio": {
            "input": {
                "format": audio_format,
                "transcription": None,
                "noise_reduction": None,
                "turn_detection": _shown_detection(options.turn_detection),
            }
        },
        "mm_ext": {"temperature": options.temperature},
    }


def _shown_truncation(truncation: Truncation) -> Any:
    if isinstance(truncation, str):
        return truncation
    written: dict[str, Any] = {"type": "retention_ratio", "retention_ratio": truncation.ratio}
    if truncation.token_limit is not None:
        written["token_limits"] = {"post_instructions": truncation.token_limit}
    return written


def _shown_detection(detection: TurnDetection | None) -> dict[str, Any] | None:
    match detection:
        case None:
            return None
        case SemanticVad():
            kind = "semantic_vad"
        case ServerVad():
            kind = "server_vad"
    return {
        "type": kind,
        **{name: getattr(detection, name) for name in detection.__dataclass_fields__},
    }
