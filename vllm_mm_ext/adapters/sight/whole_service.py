"""What an operator sees and does, over all API servers and all engines of a service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_mm_ext.adapters.quality.service import state_for
from vllm_mm_ext.adapters.sight.engine_part import UTILITY
from vllm_mm_ext.base.peers import Peers
from vllm_mm_ext.policies.kv.control import KVClient, NoBlockPoolError
from vllm_mm_ext.sight.request_log import latest, shown_url

# Seconds for which what all processes said is shown again, however many pages ask.
_FRESH_S = 1.0
# Seconds to wait for an API server or an engine. A takedown waits for requests to end first.
_ANSWER_S = 10.0
_TAKEDOWN_S = 60.0
# Seconds for engines to let go of requests that were ended.
_BUSY_S = 15.0
_POLL_S = 0.1


@dataclass(slots=True)
class _Names:
    """What is known of some files: as ``OwnPart.media`` has it."""

    digests: set[str]
    urls: set[str]
    hashes: set[str]


class WholeService:
    """Asks all processes of a service.

    Args:
        vllm_config: vLLM's configuration.
        engine_client: vLLM's ``AsyncLLM``.
        peers: The API servers.
        model: Name of the served model.
    """

    def __init__(self, vllm_config: Any, engine_client: Any, peers: Peers, model: str) -> None:
        self._config = vllm_config
        self._core = engine_client.engine_core
        self._kv = KVClient(engine_client)
        self._peers = peers
        self._model = model
        self._asking = asyncio.Lock()
        self._taking_down = asyncio.Lock()
        self._shown: dict[str, Any] = {}
        self._shown_at = -_FRESH_S

    async def begin(self) -> None:
        """Prepare the engines for takedowns."""
        await self._engines("begin", {})

    async def overview(self) -> dict[str, Any]:
        """Everything that the page shows at first, with the latest requests."""
        async with self._asking:
            if time.monotonic() - self._shown_at >= _FRESH_S:
                self._shown = await self._overview()
                self._shown_at = time.monotonic()
            return self._shown

    async def requests(self, before: float) -> list[dict[str, Any]]:
        """Older requests, the latest of those that ended at a time or before.

        Args:
            before: Seconds since the epoch.
        """
        found = await self._servers("requests", before=before)
        return latest(row for rows in found for row in rows)

    async def record(self, request_id: str) -> dict[str, Any] | None:
        """All that is known of a finished request; None if that is nothing."""
        found = await self._servers("record", request_id=request_id)
        return next((record for record in found if record is not None), None)

    async def end_session(self, session_id: str) -> bool:
        """End a live session; False if there is none of that id."""
        return any(await self._servers("end_session", session_id=session_id))

    async def session(self, action: str, key: str) -> None:
        """Pin, unpin or release a KV session on all engines.

        Args:
            action: ``pin``, ``unpin`` or ``release``.
            key: Of the session.

        Raises:
            NoBlockPoolError: The engines keep no KV of media.
        """
        await self._kv.act(action, key)

    async def media(
        self, action: str, url: str | None, digest: str | None
    ) -> dict[str, Any] | None:
        """Pin, unpin or release the KV of a file on all engines.

        Args:
            action: As of ``session``.
            url, digest: Of the file; one of them.

        Returns:
            Digests, and the number of mm items; None if nothing is known of the URL.

        Raises:
            NoBlockPoolError: The engines keep no KV of media.
        """
        names = await self._named(url, digest)
        if not names.digests:
            return None
        hashes = sorted(names.hashes)
        found = await self._keep(names.digests, hashes, action == "pin")
        if action == "release":
            found = await self._engines("let_go", {"hashes": hashes})
        if None in found:
            raise NoBlockPoolError
        return {"digests": sorted(names.digests), "items": sum(found)}

    async def _keep(
        self, digests: Collection[str], hashes: Collection[str], keeps: bool
    ) -> list[int | None]:
        """Pin files on all engines, or end their pins; what each engine answers for each file."""
        found: list[int | None] = []
        for one in digests:
            # Longer than any session id that a client can choose (``short_id``).
            asked = {"hashes": list(hashes), "key": f"media:{one}", "keeps": keeps}
            found += await self._engines("keep", asked)
        return found

    async def take_down(self, url: str | None, digest: str | None) -> dict[str, Any]:
        """Drop a file, and all that was made of it, from every process.

        Requests and live sessions about the file are ended first, so that nothing brings it back.

        Args:
            url: A URL that requests named. What is dropped is every file that they got from there.
            digest: Hex BLAKE3 of the encoded file.

        Returns:
            What was dropped; ``complete`` is whether nothing is left, ``left`` says what is, and
            ``known`` is whether any API server knew of the file.

        Raises:
            PeerError: An API server does not answer; the takedown has to be asked for again.
            TimeoutError: An engine does not answer; as above.
        """
        async with self._taking_down:
            return await self._take_down(url, digest)

    async def _take_down(self, url: str | None, digest: str | None) -> dict[str, Any]:
        names = await self._named(url, digest)
        others = await self._of_others(names.digests, names.hashes)
        ended = await self._servers(
            "end",
            _TAKEDOWN_S,
            digests=sorted(names.digests),
            urls=sorted(names.urls),
            hashes=sorted(names.hashes - others),
        )
        before = time.monotonic()
        # What requests under way noted meanwhile.
        again = await self._named(url, digest)
        digests, urls = sorted(names.digests | again.digests), sorted(names.urls | again.urls)
        hashes = sorted(names.hashes | again.hashes)
        known = bool(hashes or {*digests, *urls} - {digest, url})
        others = await self._of_others(digests, hashes)
        cleared = await self._servers(
            "clear", _TAKEDOWN_S, digests=digests, urls=urls, hashes=hashes, others=sorted(others)
        )
        # What a request uses that is about other files was made of those.
        hashes = sorted({*hashes}.difference(*(one["in_use"] for one in cleared)))
        # A pin of the file would go on with what its prompts had before the file.
        await self._keep(digests, (), keeps=False)
        engines, busy = await self._clear_engines(hashes)
        left = []
        if any(one["requests_left"] for one in (*ended, *cleared)):
            left.append("requests that did not end")
        if any(one["sessions_left"] for one in ended):
            left.append("live sessions that did not end")
        if busy:
            left.append("requests that engines still work on")
        if any(one["kv_left"] for one in engines):
            left.append("KV blocks of engines without the plugin's block pool, which are busy")
        if stores := sorted({name for one in engines for name in one["stores_left"]}):
            left.append(f"what is in stores that vLLM cannot drop it from ({', '.join(stores)})")
        if not all(one["kv_overwritten"] for one in engines):
            left.append("what KV blocks held, until other requests overwrite it")
        if not left:
            # Not before: whoever asks again must find what is left.
            await self._servers("forget", digests=digests, before=before)
        await self._servers("sweep", _TAKEDOWN_S)
        self._shown_at = -_FRESH_S
        return {
            "complete": not left,
            "known": known,
            "left": left,
            "digests": [one for one in digests if ":" not in one],
            "urls": [shown_url(one) for one in urls],
            "requests_ended": sum(one["requests"] for one in ended),
            "sessions_ended": sum(one["sessions"] for one in ended),
            "items": len(hashes),
            "inputs": sum(one["inputs"] for one in (*cleared, *engines)),
            "outputs": sum(one["outputs"] for one in engines),
            "kv_blocks": sum(one["kv_blocks"] for one in engines),
        }

    async def _clear_engines(self, hashes: Collection[str]) -> tuple[list[Any], int]:
        """Drop mm items from all engines; returns what was dropped, and requests in the way."""
        if not hashes:
            return [], 0
        arguments = {"hashes": list(hashes)}
        deadline = time.monotonic() + _BUSY_S
        # Engines that drop things do not step meanwhile, so they do it once.
        while any(await self._engines("busy", arguments)) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        found = await self._engines("take_down", arguments)
        return found, sum(one["busy"] for one in found)

    async def _named(self, url: str | None, digest: str | None) -> _Names:
        """What all API servers know of a file."""
        digests = set() if digest is None else {digest}
        first = await self._servers("media", url=url, digests=sorted(digests))
        digests |= {one for each in first for one in each["digests"]}
        # One API server may know the URL, and another one what became of the file.
        found = await self._servers("media", url=url, digests=sorted(digests))
        names = _Names(*({one for each in found for one in each[n]} for n in _Names.__slots__))
        if url is not None:
            names.urls.add(url)
        return names

    async def _of_others(self, digests: Collection[str], hashes: Collection[str]) -> set[str]:
        """Those of some mm items that were made of other files than these for sure."""
        found = await self._servers("made_of", digests=sorted(digests), hashes=sorted(hashes))
        # Files of all uses of each item, and the items that have a use without these files.
        common: dict[str, set[str]] = {}
        apart: set[str] = set()
        for each in found:
            for places, is_apart, items in each["items"]:
                files = {each["files"][place] for place in places}
                common |= {one: common.get(one, files) & files for one in items}
                apart.update(items if is_apart else ())
        return {one for one in apart if common[one]}

    async def _overview(self) -> dict[str, Any]:
        state = state_for(self._config)
        servers, engines = await asyncio.gather(
            self._servers("state"), self._engines("look", {}, _ANSWER_S)
        )
        requests = latest(row for server in servers for row in server.pop("requests"))
        loads = state.loads(self._config.parallel_config.data_parallel_size)
        items = {
            item["hash"]: item["modality"]
            for engine in engines
            for part in (engine["kv"], engine["encoder"])
            for item in (part or {}).get("items", ())
        }
        named = await self._servers("names", hashes=items)
        for engine in engines:
            for part in (engine["kv"], engine["encoder"]):
                for item in (part or {}).get("items", ()):
                    item |= _name_of(item["hash"], named)
        return {
            "time": round(time.time(), 3),
            "model": self._model,
            "tier": state.tier().level,
            "servers": servers,
            "engines": [
                {**engine, "load": asdict(loads[number]) if number in loads else None}
                for engine in engines
                for number in (engine["number"],)
            ],
            "requests": requests,
        }

    async def _servers(self, do: str, timeout_s: float = _ANSWER_S, **arguments: Any) -> list[Any]:
        return await self._peers.ask_all({"do": do, **arguments}, timeout_s)

    async def _engines(
        self, action: str, arguments: Mapping[str, Any], timeout_s: float = _TAKEDOWN_S
    ) -> list[Any]:
        asked = self._core.call_utility_all_async(UTILITY, action, dict(arguments))
        answers: list[Any] = await asyncio.wait_for(asked, timeout_s)
        return answers


def _name_of(mm_hash: str, named: Collection[Mapping[str, Any]]) -> dict[str, str]:
    for names in named:
        if mm_hash in names:
            found = names[mm_hash]
            return {"digest": found["digest"], "url": shown_url(found["url"])}
    return {}
