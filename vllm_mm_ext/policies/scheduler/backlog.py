"""Encoder work that requests still need, summed up. Pure."""

from __future__ import annotations


class Backlog:
    """Encoder outputs that are missing, by request, as far as each was last looked at."""

    def __init__(self) -> None:
        self._needs: dict[str, int] = {}
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Of all requests."""
        return self._tokens

    def set(self, key: str, tokens: int) -> None:
        """What a request needs now."""
        self._tokens += tokens - self._needs.get(key, 0)
        self._needs[key] = tokens

    def forget(self, key: str) -> None:
        """The request is no more."""
        self._tokens -= self._needs.pop(key, 0)
