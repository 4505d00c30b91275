"""Digests of encoded files, as the plugin names them."""

from __future__ import annotations

from blake3 import blake3


def digest_of(data: bytes) -> str:
    """Hex BLAKE3 digest of ``data``."""
    return str(blake3(data).hexdigest())
