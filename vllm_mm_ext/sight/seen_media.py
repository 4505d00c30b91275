"""Which files became which mm items, so that everything made of a file can be found again. Pure."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from blake3 import blake3

from vllm_mm_ext.request.media_items import ImageItem, MediaItem

# Hashes of mm items that are remembered, about 200 bytes each: more than the caches of an engine
# have items.
MAX_HASHES = 1 << 16
# URLs remembered of one file, and characters of a URL; longer ones are known by their digest alone.
_MAX_URLS = 16
_MAX_URL = 4096


@dataclass(slots=True)
class Medium:
    """One file that requests have used.

    Attributes:
        digest: Hex BLAKE3 of the file; of a file whose content is not known, ``unknown_digest``.
        modality: `video`, `audio` or `image`.
        urls: URLs under which requests named it, the last one last. Data URLs are not among them.
        hashes: vLLM's hashes of the mm items that requests with the file had, the last ones last.
            An item of another file of the same request may be among them.
        noted: Value of ``time.monotonic()`` when a request used the file last.
    """

    digest: str
    modality: str
    urls: dict[str, None] = field(default_factory=dict)
    hashes: dict[str, None] = field(default_factory=dict)
    noted: float = 0.0


class SeenMedia:
    """Files by digest, those used last; not more of them than have ``max_hashes`` hashes together.

    For one event loop.

    Args:
        max_hashes: Hashes remembered at most. A file counts as one more.
    """

    def __init__(self, max_hashes: int = MAX_HASHES) -> None:
        self._max = max_hashes
        self._media: OrderedDict[str, Medium] = OrderedDict()
        self._of_hash: dict[str, dict[str, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._media)

    def note(self, digest: str, modality: str, url: str, hashes: Iterable[str]) -> None:
        """Note that a request used a file.

        Args:
            digest: Of the file.
            modality: Of the file.
            url: As the request names it.
            hashes: vLLM's hashes of all mm items of the request.
        """
        medium = self._media.get(digest)
        if medium is None:
            medium = self._media[digest] = Medium(digest, modality)
            self._count += 1
        self._media.move_to_end(digest)
        medium.noted = time.monotonic()
        if url and len(url) <= _MAX_URL and url[:5].lower() != "data:":
            medium.urls.pop(url, None)
            medium.urls[url] = None
            while len(medium.urls) > _MAX_URLS:
                del medium.urls[next(iter(medium.urls))]
        for one in hashes:
            if one in medium.hashes:
                del medium.hashes[one]
            else:
                self._count += 1
                self._of_hash.setdefault(one, {})[digest] = None
            medium.hashes[one] = None
        while self._count > self._max and len(self._media) > 1:
            self._drop(next(iter(self._media)))
        while self._count > self._max and medium.hashes:
            self._drop_hash(medium, next(iter(medium.hashes)))

    def note_all(
        self, items: Iterable[MediaItem], images: Iterable[ImageItem], hashes: Collection[str]
    ) -> None:
        """Note which files a conversation used; those whose content is not known by their URLs.

        Args:
            items: Its videos and audios.
            images: Its images.
            hashes: vLLM's hashes of all its mm items.
        """
        for item in items:
            digest = item.known_digest or unknown_digest(item.url)
            self.note(digest, item.modality, item.url, hashes)
        for image in images:
            self.note(image.digest or unknown_digest(image.url), "image", image.url, hashes)

    def digests_at(self, url: str) -> set[str]:
        """Digests of the files that requests got from a URL."""
        found = {medium.digest for medium in self._media.values() if url in medium.urls}
        return found | ({unknown_digest(url)} & self._media.keys())

    def urls_of(self, digests: Collection[str]) -> set[str]:
        """URLs under which requests named files."""
        known = (self._media[digest] for digest in digests if digest in self._media)
        return {url for medium in known for url in medium.urls}

    def hashes_of(self, digests: Collection[str]) -> set[str]:
        """vLLM's hashes of the mm items of all requests with one of these files."""
        known = (self._media[digest] for digest in digests if digest in self._media)
        return {one for medium in known for one in medium.hashes}

    def medium_of(self, mm_hash: str, modality: str) -> Medium | None:
        """The file that an mm item was made of; None where it is not known for sure.

        Args:
            mm_hash: vLLM's hash of the item.
            modality: Of the item.
        """
        media = [self._media[digest] for digest in self._of_hash.get(mm_hash, {})]
        if len(media) > 1:
            media = [medium for medium in media if medium.modality == modality]
        return media[0] if len(media) == 1 else None

    def forget(self, digests: Collection[str], before: float) -> None:
        """Forget files, but for those that a request has used since.

        Args:
            digests: Of the files.
            before: Value of ``time.monotonic()``.
        """
        for digest in digests:
            if digest in self._media and self._media[digest].noted < before:
                self._drop(digest)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if files and hashes disagree; for tests."""
        found: dict[str, set[str]] = {}
        for digest, medium in self._media.items():
            assert medium.digest == digest
            for one in medium.hashes:
                found.setdefault(one, set()).add(digest)
        assert found == {one: set(digests) for one, digests in self._of_hash.items()}
        assert self._count == sum(1 + len(medium.hashes) for medium in self._media.values())

    def _drop(self, digest: str) -> None:
        medium = self._media[digest]
        for one in list(medium.hashes):
            self._drop_hash(medium, one)
        del self._media[digest]
        self._count -= 1

    def _drop_hash(self, medium: Medium, one: str) -> None:
        del medium.hashes[one]
        self._count -= 1
        owners = self._of_hash[one]
        del owners[medium.digest]
        if not owners:
            del self._of_hash[one]


def unknown_digest(url: str) -> str:
    """What stands for the digest of a file that vLLM read itself, so that only its URL is known.

    Args:
        url: As the request names it.
    """
    # Text from JSON may have half of a surrogate pair, which plain UTF-8 cannot encode.
    return f"url:{blake3(url.encode('utf-8', 'surrogatepass')).hexdigest()}"
