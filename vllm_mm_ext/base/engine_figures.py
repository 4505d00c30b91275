"""What each engine of a service tells of itself: figures since its start, and times of requests.

They are in the file of the service's shared state. Each engine writes its own figures every now and
then, and when it comes to rest; API servers read them without asking the engine, so a busy or
stopped engine delays nobody.

Times of requests are in one table for all engines, at a place that the request's arrival decides.
An API server reads them right after the engine wrote them; a later request may take the place.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from vllm_mm_ext.base.shared_records import Region

if TYPE_CHECKING:
    from vllm_mm_ext.base.shared_state import SharedState

# Engines of a service whose figures and load are told.
ENGINES: Final = 256
MODALITIES: Final = ("video", "audio", "image", "text", "other")
# What a step does. Steps with encoder work are "encode" whatever else they do.
STEP_KINDS: Final = ("decode", "prefill", "mixed", "encode")
TIERS: Final = ("device", "host")
# What became of media items whose outputs may come from another instance: loaded, or not there and
# so encoded here; and requests that stopped waiting for an encoder.
TRANSFERS: Final = ("loaded", "missed", "waits_ended")

# Figures that only grow as long as an engine lives.
COUNTERS: Final = (
    *(f"steps_{kind}" for kind in STEP_KINDS),
    *(f"step_s_{kind}" for kind in STEP_KINDS),
    "decode_tokens",
    "prefill_tokens",
    *(f"encoder_tokens_{modality}" for modality in MODALITIES),
    "encoder_items",
    *(f"{tier}_hits" for tier in TIERS),
    *(f"{tier}_adds" for tier in TIERS),
    *(f"{tier}_evictions" for tier in TIERS),
    *(f"transfer_{outcome}" for outcome in TRANSFERS),
    "kv_evictions",
)
# Figures of this moment. Sizes of caches are in bytes, those of the KV cache in blocks; those that
# do not exist in an engine are 0, with a capacity of 0.
GAUGES: Final = (
    *(f"{tier}_bytes" for tier in TIERS),
    *(f"{tier}_capacity" for tier in TIERS),
    *(f"{tier}_items" for tier in TIERS),
    "kv_blocks",
    "kv_used_blocks",
    "kv_kept_blocks",
    "kv_pressure",
    "kv_media_items",
    *(f"kv_media_tokens_{modality}" for modality in MODALITIES),
    "running",
    "waiting",
)
FIGURES: Final = COUNTERS + GAUGES

# Of an answer that is not streamed, the times are read at its end.
_PLACES = 1 << 16
_FIGURES_LAYOUT = struct.Struct(f"<{len(FIGURES)}d")
_COUNTERS_LAYOUT = struct.Struct(f"<{len(COUNTERS)}d")
_TIMES_LAYOUT = struct.Struct("<4d")
_ARRIVAL = struct.Struct("<d")

_WRITTEN = Region(_FIGURES_LAYOUT, ENGINES, 0)
_TAKEN = Region(_COUNTERS_LAYOUT, ENGINES, _WRITTEN.end)
_TIMES = Region(_TIMES_LAYOUT, _PLACES, _TAKEN.end)
# Bytes at the beginning of the shared state's file.
BOARD_BYTES: Final = _TIMES.end


class EngineTimes(NamedTuple):
    """What a request waited for in its engine, from its first step to its first token.

    Attributes:
        encode_s: Seconds of steps in which an encoder worked for the request.
        prefill_s: Seconds of other steps that computed tokens of its prompt.
        wait_s: Seconds in which no step did anything for it.
    """

    encode_s: float
    prefill_s: float
    wait_s: float


class EngineBoard:
    """The figures of the engines of a service.

    Args:
        state: The service's shared state.
    """

    def __init__(self, state: SharedState) -> None:
        self._state = state

    def write(self, engine: int, figures: dict[str, float]) -> None:
        """Publish an engine's figures; only the engine itself calls this.

        Args:
            engine: Index of the engine; engines from index ``ENGINES`` on are ignored.
            figures: A value for each of ``FIGURES``, in that order.
        """
        if engine < ENGINES:
            _WRITTEN.write(self._state.view, engine, *figures.values())

    def clear(self, engine: int) -> None:
        """Note that an engine has ended."""
        if engine < ENGINES:
            _WRITTEN.clear(self._state.view, engine)

    def figures(self, engine: int) -> dict[str, float] | None:
        """An engine's newest figures by name; None if it has published none."""
        values = _WRITTEN.read(self._state.view, engine) if engine < ENGINES else None
        return None if values is None else dict(zip(FIGURES, values, strict=True))  # type: ignore[arg-type]

    def take(self, engine: int) -> dict[str, float]:
        """By how much an engine's counters have grown since any process called this last.

        So each bit of growth is given to one process, and the sum over processes is right whichever
        of them call.
        """
        with self._state.writing() as held:
            found = self.figures(engine) if held else None
            if found is None:
                return {}
            now = {name: found[name] for name in COUNTERS}
            before = _TAKEN.read(self._state.view, engine) or (0.0,) * len(COUNTERS)
            _TAKEN.write(self._state.view, engine, *now.values())
            grown = zip(now.items(), before, strict=True)
            # An engine that took the place of another one counts from 0.
            return {n: v - b if v >= b else v for (n, v), b in grown}  # type: ignore[operator]

    def write_times(self, arrival: float, times: EngineTimes) -> None:
        """Publish a request's times, unless those of a request of the same arrival are there.

        Args:
            arrival: vLLM's arrival time of the request, by which its API server knows it.
            times: The times.
        """
        if self.times(arrival) is None:
            _TIMES.write(self._state.view, _place(arrival), arrival, *times)

    def times(self, arrival: float) -> EngineTimes | None:
        """A request's times; None if its engine has published none, or another took its place."""
        values = _TIMES.read(self._state.view, _place(arrival))
        if values is None or values[0] != arrival:
            return None
        return EngineTimes(*values[1:])  # type: ignore[arg-type]


def _place(arrival: float) -> int:
    # Not ``hash``: that of times within a second differ in their upper bits alone.
    return zlib.crc32(_ARRIVAL.pack(arrival)) % _PLACES
