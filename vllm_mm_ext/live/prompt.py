"""What the model is shown of a session: messages of text, generated tokens, pictures, and media.

Media that arrive over time are stretches of units. A unit is what the model can take in once it is
complete: a fixed time of sound (the model family's own, such as 2 s for Qwen2.5-Omni) and the
frames of that time. Only the last unit of a closed stretch may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from vllm_mm_ext.live.client_events import Role


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A frame as the model's processor would resize it.

    Attributes:
        pixels: uint8 RGB ``[height, width, 3]``.
        time_s: Seconds from the start of its stretch.
    """

    pixels: npt.NDArray[np.uint8]
    time_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Sound and frames of one piece of time; never changed once made.

    Attributes:
        samples: float32 mono at the model's rate; empty where there is no sound.
        frames: In order of their times, at most ``fps`` a second; may be empty beside sound.
    """

    samples: npt.NDArray[np.float32]
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Text that a client wrote."""

    text: str


@dataclass(frozen=True, slots=True)
class Generated:
    """What the model itself wrote: its very tokens, so that the prompt has the KV of the answer.

    Attributes:
        token_ids: Without the token that ended the answer.
        text: The same as text.
    """

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image that a client put into an item, as every prompt takes it.

    Attributes:
        image: In RGB.
        digest: Of its file.
    """

    image: Image.Image
    digest: str

    @property
    def nbytes(self) -> int:
        """What its pixels take: Pillow has four bytes for each."""
        return 4 * self.image.width * self.image.height


@dataclass(frozen=True, slots=True)
class Stretch:
    """Units that follow each other: one video with or without sound, or one sound, of the prompt.

    All units of a stretch have frames, or none has; all but perhaps the last have sound, or none.

    Attributes:
        stretch_id: Names the stretch within its session; units with the same place in stretches of
            one name are the same units.
        units: The complete units so far, at least one.
    """

    stretch_id: str
    units: tuple[Unit, ...]


Part = Text | Generated | Picture | Stretch


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the conversation."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The conversation at some moment.

    Attributes:
        messages: In order; the first may be the system's.
        open: Whether the last message goes on: no tokens that end it follow, and nothing is asked.
    """

    messages: tuple[Message, ...]
    open: bool
