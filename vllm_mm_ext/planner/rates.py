"""Seconds that pieces of work take on a machine: what estimates are made of."""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_mm_ext.planner.step_costs import NotNegative, StepCosts

# Keys of rates that are no seconds.
_NO_SECONDS = {"decode_threads", "engine_threads"}


class HostCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a core that the API server and its decode workers spend.

    Attributes:
        request: The API server's main thread, for a request.
        medium: The same, for a medium of it.
        sent_input: The same, for an encoder input that goes to the engine.
        token: The same, for a token of an answer.
        probe: A probe worker, for a medium.
        decode: A decode worker, for a medium.
        megapixel: The same, for a megapixel decoded, by FFmpeg's name of the codec; of pictures
            that are no video, the preprocessing thread.
        frame_megapixel: The same, for a megapixel of the frames that it delivers.
        sound_second: The same, for a second of sound.
        preprocess: The preprocessing thread, for a medium.
        preprocess_input: The same, for an input of the vision encoder.
        preprocess_sound_second: The same, for a second of sound.
        decode_threads: Cores that a decode keeps busy.
        engine_threads: Cores that a step of the engine takes from others.
        cached_medium: The API server, all threads, for a medium whose frames and encoder inputs its
            caches hold; None: not measured.
        cached_input: The same, for an encoder input of such a medium.
    """

    request: NotNegative
    medium: NotNegative
    sent_input: NotNegative
    token: NotNegative
    probe: NotNegative
    decode: NotNegative
    megapixel: dict[str, NotNegative]
    frame_megapixel: NotNegative
    sound_second: NotNegative
    preprocess: NotNegative
    preprocess_input: NotNegative
    preprocess_sound_second: NotNegative
    decode_threads: Annotated[float, msgspec.Meta(gt=0)]
    engine_threads: Annotated[float, msgspec.Meta(gt=0)]
    # Files of earlier versions do not have these.
    cached_medium: NotNegative | None = None
    cached_input: NotNegative = 0.0


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What everything costs on one machine, for one model.

    Attributes:
        step: Steps of the engine.
        host: Work of the API server and its workers.
    """

    step: StepCosts
    host: HostCosts

    def scaled(self, *, step: float = 1.0, host: float = 1.0) -> Rates:
        """The same work in other times.

        Args:
            step: Factor of all seconds of engine steps.
            host: Factor of all seconds of the host.
        """
        steps = {key: step * value for key, value in msgspec.structs.asdict(self.step).items()}
        hosts = msgspec.structs.asdict(self.host)
        for key, value in hosts.items():
            if key == "megapixel":
                hosts[key] = {codec: host * seconds for codec, seconds in value.items()}
            elif value is not None and key not in _NO_SECONDS:
                hosts[key] = host * value
        return Rates(StepCosts(**steps), HostCosts(**hosts))


class RatesRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rates and the range in which they are.

    Attributes:
        low: What everything costs at least, as a rule.
        middle: The best guess.
        high: What everything costs at most, as a rule.
    """

    low: Rates
    middle: Rates
    high: Rates

    @classmethod
    def around(
        cls, middle: Rates, step: tuple[float, float], host: tuple[float, float]
    ) -> RatesRange:
        """A range of some factors around rates.

        Args:
            middle: The rates.
            step: Lowest and highest factor of the seconds of engine steps.
            host: The same of the host's.
        """
        low, high = (
            middle.scaled(step=factor, host=other) for factor, other in zip(step, host, strict=True)
        )
        return cls(low, middle, high)
