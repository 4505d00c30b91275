"""Configuration of the composer: a vision tower, an audio tower and projectors for any text model.

Read by training, by transformers' Auto classes and by vLLM; imports neither torch nor vLLM.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING, AutoConfig

from vllm_mm_ext.config.options import Reduction

MODEL_TYPE = "mm_ext_composer"
ARCHITECTURE = "MMExtComposerForConditionalGeneration"

SPECIAL_TOKENS = {
    "video_start_token_id": "<video>",
    "frame_token_id": "<frame>",
    "video_end_token_id": "</video>",
    "audio_start_token_id": "<audio>",
    "audio_end_token_id": "</audio>",
    "video_pad_token_id": "<|video_pad|>",
    "audio_pad_token_id": "<|audio_pad|>",
}
"""Config key to the token whose id it holds."""

METHODS = ("learned", "average")

# Whisper's front end: 16 kHz, 10 ms between log-mel frames, two of them per encoder frame.
SAMPLE_RATE = 16_000
HOP = 160
MEL_PER_STATE = 2
STATES_PER_SECOND = SAMPLE_RATE // (HOP * MEL_PER_STATE)


class Declared(NamedTuple):
    """A reduction that a checkpoint was trained for.

    Attributes:
        pool: Side of the square of patch tokens that becomes one.
        temporal: Frames that become one group.
        method: How a group is made of its frames: ``learned`` or ``average``.
    """

    pool: int
    temporal: int
    method: str


class ComposerConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of a composer checkpoint.

    Args:
        text_config: Of any transformers text model. Required.
        vision_config: ``SiglipVisionConfig``. Required.
        audio_config: ``WhisperConfig``, of which the encoder's fields count; None: no sound.
        reductions: ``{"pool", "temporal", "method"}`` of each reduction the checkpoint supports
            besides none. ``method`` is ``learned`` unless given.
        default_reduction: ``{"pool", "temporal"}`` where a request names none; one of
            ``reductions``, or 1 and 1.
        fps: Frames per second of a video whose frame times are not known, and by default.
        timestamps: The seconds at which a group of frames begins are written before it.
        audio_window_s: Seconds of sound that the audio encoder sees at once.
        audio_stack: Encoder frames of 20 ms that become one token.
        audio_pad_windows: The encoder sees silence up to the end of the window, as Whisper's
            released weights were trained; what it makes of the silence is dropped.
        hidden: Width of the projectors; None: that of the vision tower.
        turn_end_token_id: Token that the model was trained to write right after what it hears of a
            user whose turn has ended; None: it was not trained to tell.
        heads: Attention heads of the projectors; None: those of the vision tower.
        video_start_token_id, frame_token_id, video_end_token_id, audio_start_token_id,
            audio_end_token_id, video_pad_token_id, audio_pad_token_id: Ids of `SPECIAL_TOKENS`.
            Required.

    Raises:
        ValueError: A value is missing or wrong. The message names the key, the value and what is
            valid.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True
    sub_configs = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
    }

    text_config: Any = None  # Fields or a configuration; a configuration from here on.
    vision_config: Any = None
    audio_config: Any = None
    reductions: list[Any] | None = None
    default_reduction: dict[str, Any] | None = None
    fps: float = 2.0
    timestamps: bool = False
    audio_window_s: float = 30.0
    audio_stack: int = 1
    audio_pad_windows: bool = True
    hidden: int | None = None
    heads: int | None = None
    turn_end_token_id: int | None = None
    video_start_token_id: int = -1
    frame_token_id: int = -1
    video_end_token_id: int = -1
    audio_start_token_id: int = -1
    audio_end_token_id: int = -1
    video_pad_token_id: int = -1
    audio_pad_token_id: int = -1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _sub_config("text_config", self.text_config, None)
        self.vision_config = _sub_config("vision_config", self.vision_config, "siglip_vision_model")
        if self.audio_config is not None:
            self.audio_config = _sub_config("audio_config", self.audio_config, "whisper")
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        # The architecture is the class that vLLM serves, whoever wrote the checkpoint.
        kwargs["architectures"] = [ARCHITECTURE]
        _check_vision(self.vision_config)
        if self.hidden is None:
            self.hidden = int(self.vision_config.hidden_size)
        if self.heads is None:
            self.heads = int(self.vision_config.num_attention_heads)
        self._check_numbers()
        self.reductions = [
            _declared(f"reductions[{index}]", given)._asdict()
            for index, given in enumerate(self.reductions or [])
        ]
        self._check_reductions()
        end = self.turn_end_token_id
        if end is not None and not (_is_int(end) and 0 <= end < self.text_config.vocab_size):
            raise ValueError(
                f"turn_end_token_id is {end!r}; it must be the id of a token, from 0 to "
                f"{self.text_config.vocab_size - 1}, or null"
            )
        for key, token in SPECIAL_TOKENS.items():
            value = getattr(self, key)
            if not _is_int(value) or value < 0:
                shown = "missing" if value == -1 else repr(value)
                raise ValueError(f"{key} is {shown}; it must be the id of the token {token!r}")
        super().__post_init__(**kwargs)

    def _check_numbers(self) -> None:
        for key in ("fps", "audio_window_s"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{key} is {value!r}; it must be a number above 0")
        for key in ("hidden", "heads", "audio_stack"):
            value = getattr(self, key)
            if not _is_int(value) or value < 1:
                raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
        assert self.hidden is not None
        assert self.heads is not None
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden is {self.hidden}; it must be a multiple of heads ({self.heads})"
            )
        states = self.audio_window_s * STATES_PER_SECOND
        if states != int(states):
            raise ValueError(
                f"audio_window_s is {self.audio_window_s!r}; it must be a multiple of the audio "
                f"encoder's frame of {1 / STATES_PER_SECOND} s"
            )
        if self.audio_config is None:
            return
        most = int(self.audio_config.max_source_positions)
        if states > most or (self.audio_pad_windows and states != most):
            bound = "exactly" if self.audio_pad_windows else "at most"
            raise ValueError(
                f"audio_window_s is {self.audio_window_s!r}, {int(states)} encoder frames; with "
                f"audio_config.max_source_positions {most} and audio_pad_windows "
                f"{self.audio_pad_windows} it must be {bound} {most / STATES_PER_SECOND} s"
            )

    def _check_reductions(self) -> None:
        declared = self.declared
        for index, one in enumerate(declared):
            if max(one.pool, 1) > self.side:
                raise ValueError(
                    f"reductions[{index}].pool is {one.pool}; a frame is {self.side} x {self.side} "
                    f"patches, so it must be from 1 to {min(8, self.side)}"
                )
            if one[:2] == (1, 1):
                raise ValueError(f"reductions[{index}] reduces nothing; leave it out")
        pairs = [one[:2] for one in declared]
        for index, pair in enumerate(pairs):
            if pair in pairs[:index]:
                raise ValueError(
                    f"reductions[{index}] is pool {pair[0]}, temporal {pair[1]} again; "
                    "each pair may stand there once"
                )
        given = self.default_reduction or {}
        default = _declared("default_reduction", given | {"method": "learned"})
        if "method" in given:
            raise ValueError("default_reduction.method is not a key; valid: pool, temporal")
        if default[:2] not in ((1, 1), *pairs):
            raise ValueError(
                f"default_reduction is pool {default.pool}, temporal {default.temporal}; it must "
                f"be one of {self.supported()}"
            )
        self.default_reduction = {"pool": default.pool, "temporal": default.temporal}

    # --- what follows from the fields -------------------------------------------------------------

    @property
    def side(self) -> int:
        """Patches of a frame vertically, and horizontally; what is left at an edge is not seen."""
        return int(self.vision_config.image_size // self.vision_config.patch_size)

    @property
    def image_token_index(self) -> int:
        """Id of ``<|video_pad|>``, under the name by which vLLM asks for a draft model."""
        return self.video_pad_token_id

    @property
    def hears(self) -> bool:
        """Whether the checkpoint has an audio tower."""
        return self.audio_config is not None

    @property
    def declared(self) -> tuple[Declared, ...]:
        """The reductions that the checkpoint supports besides none."""
        return tuple(Declared(**one) for one in self.reductions or ())

    def method(self, pool: int, temporal: int) -> str:
        """How groups are made of ``temporal`` frames after pooling by ``pool``.

        Raises:
            ValueError: The checkpoint does not declare the pair.
        """
        if (pool, temporal) == (1, 1):
            return "learned"
        for one in self.declared:
            if one[:2] == (pool, temporal):
                return one.method
        raise ValueError(
            f"the checkpoint does not support pool {pool}, temporal {temporal}; "
            f"it supports {self.supported()}"
        )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pool and temporal of the reductions that the checkpoint supports; first, none."""
        return ((1, 1), *(one[:2] for one in self.declared))

    def supported(self) -> str:
        """The reductions that the checkpoint supports, in words."""
        return "; ".join(f"pool {pool}, temporal {temporal}" for pool, temporal in self.pairs)

    def frame_tokens(self, pool: int) -> int:
        """Tokens of a frame, or of a group of frames, after pooling by ``pool``."""
        return Reduction(pool=pool).count(1, self.side, self.side)

    @property
    def window_samples(self) -> int:
        """Samples at 16 kHz that the audio encoder sees at once."""
        return round(self.audio_window_s * SAMPLE_RATE)

    def audio_states(self, samples: int) -> list[int]:
        """True encoder frames of each window of a waveform; the last window may be shorter.

        Args:
            samples: Of the waveform at 16 kHz.
        """
        window = self.window_samples
        lengths = [min(window, samples - begin) for begin in range(0, samples, window)]
        return [math.ceil(length / (HOP * MEL_PER_STATE)) for length in lengths]

    def audio_tokens(self, samples: int) -> list[int]:
        """Tokens of each window of a waveform of so many samples at 16 kHz.

        Raises:
            ValueError: There is sound, and the checkpoint has no audio tower.
        """
        if samples and self.audio_config is None:
            raise ValueError("audio_config is null: the checkpoint hears nothing")
        return [math.ceil(states / self.audio_stack) for states in self.audio_states(samples)]


def _sub_config(key: str, given: Any, model_type: str | None) -> Any:
    if given is None:
        raise ValueError(f"{key} is missing; a composer has one")
    if isinstance(given, PreTrainedConfig):
        found = given.model_type
    elif isinstance(given, dict):
        found = given.get("model_type", model_type)
    else:
        raise ValueError(f"{key} is {given!r}; it must be a configuration or its fields")
    if model_type is not None and found != model_type:
        raise ValueError(f"{key}.model_type is {found!r}; valid: {model_type!r}")
    if isinstance(given, PreTrainedConfig):
        return given
    if found not in CONFIG_MAPPING:
        raise ValueError(
            f"{key}.model_type is {found!r}; it must be one that transformers knows (qwen3, llama)"
        )
    return CONFIG_MAPPING[found](**{k: v for k, v in given.items() if k != "model_type"})


def _check_vision(vision: Any) -> None:
    if vision.image_size < vision.patch_size:
        raise ValueError(
            f"vision_config.image_size is {vision.image_size}; it must be at least "
            f"vision_config.patch_size ({vision.patch_size})"
        )


def _declared(where: str, given: Any) -> Declared:
    if isinstance(given, Declared):
        given = given._asdict()
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}; it must have the keys pool, temporal and method")
    for key in given:
        if key not in Declared._fields:
            raise ValueError(f"{where}.{key} is not a key; valid: {', '.join(Declared._fields)}")
    values: list[int] = []
    for key in ("pool", "temporal"):
        value = given.get(key, 1)
        if not _is_int(value) or not 1 <= value <= 8:
            raise ValueError(f"{where}.{key} is {value!r}; it must be a whole number from 1 to 8")
        values.append(value)
    method = given.get("method", "learned")
    if method not in METHODS:
        raise ValueError(f"{where}.method is {method!r}; valid: {', '.join(METHODS)}")
    return Declared(values[0], values[1], method)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def register_config() -> None:
    """Make transformers' ``AutoConfig`` know the composer; may be called again."""
    AutoConfig.register(MODEL_TYPE, ComposerConfig, exist_ok=True)
