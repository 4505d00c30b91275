"""Which files became which mm items, so that everything made of a file can be found again. Pure."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from blake3 import blake3

from vllm_mm_ext.request.media_items import ImageItem, MediaItem

# Files and hashes of mm items that are remembered, some hundred bytes each: more than the caches of
# an engine have items. Those that requests used together count once for each such set.
MAX_NOTED = 1 << 16
# URLs remembered of one file, and characters of a URL; longer ones are known by their digest alone.
_MAX_URLS = 16
_MAX_URL = 4096
# Characters of URLs for each file or hash that may be remembered, all together.
_URL_CHARS = 512


@dataclass(slots=True)
class Medium:
    """One file that requests have used.

    Attributes:
        digest: Hex BLAKE3 of the file; of a file whose content is not known, ``unknown_digest``.
        modality: `video`, `audio` or `image`.
        urls: URLs under which requests named it, the last one last. Data URLs are not among them.
        uses: The uses of which it is a part.
        noted: Value of ``time.monotonic()`` when a request used the file last.
    """

    digest: str
    modality: str
    urls: dict[str, None] = field(default_factory=dict)
    uses: set[_Use] = field(default_factory=set)
    noted: float = 0.0


class _Use(NamedTuple):
    """Files that requests used together, and vLLM's hashes of all mm items made of these files."""

    digests: frozenset[str]
    hashes: frozenset[str]

    @property
    def places(self) -> int:
        return len(self.digests) + len(self.hashes)


class Made(NamedTuple):
    """What is known of the files of which an mm item may have been made.

    An item is another file's for sure only if it has such ``files`` and is ``apart``: a file that
    is always sent along is a common one too, and no use tells its items from those of the files.

    Attributes:
        files: Digests of the files that all requests with the item used. There are none if a client
            gave one `uuid` to several files.
        apart: Whether a request with the item used none of the files that are asked about.
    """

    files: frozenset[str]
    apart: bool


class SeenMedia:
    """Files by digest, and what was made of them, as far as the uses that came last tell.

    Which item of a request was made of which of its files is not noted, so that a request costs as
    much as it has files and items. For any thread.

    Args:
        most: Files and hashes remembered at most, those of each use counted anew, and URLs of 512
            times as many characters. The last use is remembered in any case.
    """

    def __init__(self, most: int = MAX_NOTED) -> None:
        self._most = most
        self._media: dict[str, Medium] = {}
        # The one that came last is the last.
        self._uses: OrderedDict[_Use, None] = OrderedDict()
        self._of_hash: dict[str, set[_Use]] = {}
        self._count = 0
        self._chars = 0  # of all URLs
        self._lock = threading.Lock()

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
        self._note([(digest, modality, url)], hashes)

    def note_all(
        self, items: Iterable[MediaItem], images: Iterable[ImageItem], hashes: Collection[str]
    ) -> None:
        """Note which files a conversation used; those whose content is not known by their URLs.

        Args:
            items: Its videos and audios.
            images: Its images.
            hashes: vLLM's hashes of all its mm items.
        """
        files: list[tuple[str, str, str]] = [
            (one.known_digest or unknown_digest(one.url), one.modality, one.url) for one in items
        ]
        files += [(one.digest or unknown_digest(one.url), "image", one.url) for one in images]
        self._note(files, hashes)

    def _note(self, files: Collection[tuple[str, str, str]], hashes: Iterable[str]) -> None:
        if not files:
            return
        use = _Use(frozenset(digest for digest, _, _ in files), frozenset(hashes))
        with self._lock:
            now = time.monotonic()
            for digest, modality, url in files:
                medium = self._media.setdefault(digest, Medium(digest, modality))
                medium.noted = now
                if url and len(url) <= _MAX_URL and url[:5].lower() != "data:":
                    self._add_url(medium, url)
            self._add(use)
            self._uses.move_to_end(use)
            while self._is_full() and len(self._uses) > 1:
                self._drop(next(iter(self._uses)))

    def digests_at(self, url: str) -> set[str]:
        """Digests of the files that requests got from a URL."""
        with self._lock:
            found = {medium.digest for medium in self._media.values() if url in medium.urls}
            return found | ({unknown_digest(url)} & self._media.keys())

    def urls_of(self, digests: Collection[str]) -> set[str]:
        """URLs under which requests named files."""
        with self._lock:
            known = (self._media[digest] for digest in digests if digest in self._media)
            return {url for medium in known for url in medium.urls}

    def hashes_of(self, digests: Collection[str]) -> set[str]:
        """vLLM's hashes of the mm items of all requests with one of these files."""
        with self._lock:
            known = (self._media[digest] for digest in digests if digest in self._media)
            return {one for medium in known for use in medium.uses for one in use.hashes}

    def made_of(self, digests: Collection[str], hashes: Iterable[str]) -> dict[str, Made]:
        """Of which files some mm items may have been made, as far as they are known.

        Args:
            digests: Of the files that are asked about.
            hashes: vLLM's hashes of the items.
        """
        asked = frozenset(digests)
        with self._lock:
            return {one: self._made_of(asked, one) for one in hashes if one in self._of_hash}

    def medium_of(self, mm_hash: str, modality: str) -> Medium | None:
        """The file that an mm item was made of; None where it is not known for sure.

        Args:
            mm_hash: vLLM's hash of the item.
            modality: Of the item.
        """
        with self._lock:
            if mm_hash not in self._of_hash:
                return None
            media = [self._media[digest] for digest in self._made_of(frozenset(), mm_hash).files]
        if len(media) > 1:
            media = [medium for medium in media if medium.modality == modality]
        return media[0] if len(media) == 1 else None

    def forget(self, digests: Collection[str], before: float) -> None:
        """Forget files, but for those that a request has used since.

        Args:
            digests: Of the files.
            before: Value of ``time.monotonic()``.
        """
        with self._lock:
            known = (self._media[digest] for digest in digests if digest in self._media)
            gone = frozenset(medium.digest for medium in known if medium.noted < before)
            uses = {use for digest in gone for use in self._media[digest].uses}
            made = {one: self._made_of(gone, one) for use in uses for one in use.hashes}
            of_others = {one for one, (files, apart) in made.items() if files and apart}
            for use in uses:
                # The other files are still known.
                left = _Use(use.digests - gone, use.hashes & of_others)
                if left.digests:
                    self._add(left)
                self._drop(use)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if files, uses and hashes disagree; for tests."""
        of_file: dict[str, set[_Use]] = {}
        of_hash: dict[str, set[_Use]] = {}
        for use in self._uses:
            for digest in use.digests:
                of_file.setdefault(digest, set()).add(use)
            for one in use.hashes:
                of_hash.setdefault(one, set()).add(use)
        assert of_file == {digest: medium.uses for digest, medium in self._media.items()}
        assert of_hash == self._of_hash
        assert self._count == sum(use.places for use in self._uses)
        assert self._chars == sum(len(url) for one in self._media.values() for url in one.urls)

    def _is_full(self) -> bool:
        return self._count > self._most or self._chars > _URL_CHARS * self._most

    def _add_url(self, medium: Medium, url: str) -> None:
        self._chars += 0 if url in medium.urls else len(url)
        medium.urls.pop(url, None)
        medium.urls[url] = None
        while len(medium.urls) > _MAX_URLS:
            oldest = next(iter(medium.urls))
            del medium.urls[oldest]
            self._chars -= len(oldest)

    def _made_of(self, digests: frozenset[str], mm_hash: str) -> Made:
        """As ``made_of``, of one item, which is known."""
        files = [use.digests for use in self._of_hash[mm_hash]]
        return Made(frozenset.intersection(*files), any(used.isdisjoint(digests) for used in files))

    def _add(self, use: _Use) -> None:
        if use in self._uses:
            return
        self._uses[use] = None
        self._count += use.places
        for digest in use.digests:
            self._media[digest].uses.add(use)
        for one in use.hashes:
            self._of_hash.setdefault(one, set()).add(use)

    def _drop(self, use: _Use) -> None:
        del self._uses[use]
        self._count -= use.places
        for digest in use.digests:
            medium = self._media[digest]
            medium.uses.discard(use)
            if not medium.uses:
                del self._media[digest]
                self._chars -= sum(map(len, medium.urls))
        for one in use.hashes:
            uses = self._of_hash[one]
            uses.discard(use)
            if not uses:
                del self._of_hash[one]


def unknown_digest(url: str) -> str:
    """What stands for the digest of a file that vLLM read itself, so that only its URL is known.

    Args:
        url: As the request names it.
    """
    # Text from JSON may have half of a surrogate pair, which plain UTF-8 cannot encode.
    return f"url:{blake3(url.encode('utf-8', 'surrogatepass')).hexdigest()}"
