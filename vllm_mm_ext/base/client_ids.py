"""Ids that clients choose for media and sessions, at a length that can be remembered. Pure.

Caches and tables keep such an id for each mm item or session, often for hours. A client may send
megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from blake3 import blake3

MAX_CHARACTERS = 64
"""Length up to which a client's id is used as it is: vLLM's events and caches name it."""
MAX_HASH_CHARACTERS = 256
"""Length of the longest mm hash taken from a client; those the plugin makes have 150."""


def short_id(value: str, kind: Literal["media", "session"]) -> str:
    """An id that stands for a client's one: equal for equal ids, different for different ones.

    Args:
        value: What the client sent.
        kind: What it names. Ids of different kinds have different digests.

    Returns:
        The id itself, or a digest of it if it is long. A digest is longer than ``MAX_CHARACTERS``,
        so no client can send an id that is another one's digest.
    """
    if len(value) <= MAX_CHARACTERS:
        return value
    context = f"vllm_mm_ext 2026-11 {kind} id"
    # JSON can hold half a surrogate pair.
    raw = value.encode("utf-8", "surrogatepass")
    return f"blake3-{blake3(raw, derive_key_context=context).hexdigest()}"


def short_media_ids(
    ids: Mapping[str, Sequence[str | None]],
) -> dict[str, Sequence[str | None]]:
    """``short_id`` of each item's id, by modality; None, for an item without an id, stays."""
    return {
        modality: [short_id(one, "media") if isinstance(one, str) else one for one in own]
        for modality, own in ids.items()
    }


def too_long(hashes: Mapping[str, Iterable[str]]) -> int | None:
    """The length of the first mm hash that is too long to be kept; None if none is."""
    lengths = (len(one) for own in hashes.values() for one in own)
    return next((length for length in lengths if length > MAX_HASH_CHARACTERS), None)
