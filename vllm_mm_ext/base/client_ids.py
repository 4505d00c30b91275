"""Bounds the length of ids that clients choose for media and sessions. Pure.

Caches and tables keep such an id for each mm item or session, often for hours, and a client may
send an id of megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from blake3 import blake3

MAX_CHARACTERS = 64
"""Most characters of an id that is kept as the client sent it, as vLLM's events show ids."""
MAX_HASH_CHARACTERS = 256
"""Most characters of an mm hash that is taken from a client; the plugin's own have up to 150."""


def short_id(value: str, kind: Literal["media", "session"]) -> str:
    """A short id for a client's id; equal ids have equal short ids, different ids different ones.

    Args:
        value: The id that the client sent.
        kind: What the id names. Ids of different kinds have different digests.

    Returns:
        The id itself, or a digest of an id that is longer than ``MAX_CHARACTERS``. The digest is
        longer than that, too, so no client can send the digest of another client's id.
    """
    if len(value) <= MAX_CHARACTERS:
        return value
    context = f"vllm_mm_ext 2026-11 {kind} id"
    # Text from JSON may have half of a surrogate pair, which plain UTF-8 cannot encode.
    raw = value.encode("utf-8", "surrogatepass")
    return f"blake3-{blake3(raw, derive_key_context=context).hexdigest()}"


def short_media_ids(
    ids: Mapping[str, Sequence[str | None]],
) -> dict[str, Sequence[str | None]]:
    """``short_id`` of each mm item's id, by modality; None (an item without an id) stays None."""
    return {
        modality: [short_id(one, "media") if isinstance(one, str) else one for one in own]
        for modality, own in ids.items()
    }


def too_long(hashes: Mapping[str, Iterable[str]]) -> int | None:
    """Length of the first mm hash that is longer than ``MAX_HASH_CHARACTERS``; None if none is."""
    lengths = (len(one) for own in hashes.values() for one in own)
    return next((length for length in lengths if length > MAX_HASH_CHARACTERS), None)
