"""The encoder cache of a simulated server, by the class that decides for an engine's tiers."""

from __future__ import annotations

from vllm_mm_ext.policies.encoder_cache.byte_cache import ByteCache

# A medium is cut into parts so that rounding to whole parts leaves at most such a share of the
# cache unused; it has no more of them than mm items.
_LEAST_PART = 1 / 16


class EncoderOutputs:
    """Which encoder outputs a server has.

    What is encoded is kept by both tiers, so what the smaller one has the larger one has as well,
    and the larger one alone is looked at.

    Args:
        num_bytes: Capacity of the larger tier.
    """

    def __init__(self, num_bytes: int) -> None:
        self._cache = ByteCache(max(1, num_bytes))
        self._part = max(1.0, self._cache.capacity * _LEAST_PART)
        self._user = 0

    def parts(self, items: int, output_bytes: int) -> int:
        """Into how many parts a medium is cut.

        Args:
            items: Its mm items.
            output_bytes: Bytes of its outputs.
        """
        return max(1, min(items, round(output_bytes / self._part)))

    def holds(self, media: str) -> bool:
        """Whether the outputs of a medium are there, judged by its first part."""
        return f"{media}/0" in self._cache

    def use(self, media: str, parts: int, first: int, output_bytes: int, cost: float) -> int:
        """Have a request use parts of a medium; those that are missing are encoded and kept.

        Args:
            media: Name of the medium.
            parts: Into how many parts it is cut.
            first: The first part that the request needs; it needs all after it too.
            output_bytes: Bytes of the outputs of the whole medium.
            cost: Work of encoding the whole medium.

        Returns:
            How many parts are encoded.
        """
        cache = self._cache
        self._user += 1
        user, size, encoded = str(self._user), max(1, output_bytes // parts), 0
        for part in range(first, parts):
            key = f"{media}/{part}"
            if key in cache:
                cache.use(key, user)
            else:
                if size <= cache.capacity:
                    cache.evict_to_fit(size)
                cache.add(key, size, cost / parts, user)
                encoded += 1
            # Prefill follows the encoder closely, so no part is used for long.
            cache.release(key, user)
        return encoded
