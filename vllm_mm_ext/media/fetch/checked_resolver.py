"""Name resolution that leaves out addresses media must not be downloaded from."""

from __future__ import annotations

import socket

from aiohttp.abc import AbstractResolver, ResolveResult

from vllm_mm_ext.errors import ForbiddenMediaError
from vllm_mm_ext.media.fetch.address_rules import AddressRules


class CheckedResolver(AbstractResolver):
    """Resolves a host name once and passes on the allowed ones of its addresses.

    aiohttp connects to the addresses a resolver returned and never resolves the name again. So the
    address that was checked is the address that is contacted, whatever the name's owner answers to
    a second query (DNS rebinding). aiohttp does not ask a resolver about hosts written as IP
    addresses: those are for the caller to check.

    Args:
        rules: Which addresses are allowed.
        resolver: Resolves the names.
    """

    def __init__(self, rules: AddressRules, resolver: AbstractResolver) -> None:
        self._rules = rules
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """See ``AbstractResolver.resolve``.

        Raises:
            ForbiddenMediaError: The host has addresses, and none is allowed.
            OSError: The name cannot be resolved.
        """
        found = await self._resolver.resolve(host, port, family)
        allowed = [result for result in found if self._rules.allows(result["host"])]
        if not found:
            raise socket.gaierror(socket.EAI_NODATA, "no address")
        if not allowed:
            raise ForbiddenMediaError(
                f"This server does not download media from the addresses that {host} has."
            )
        return allowed

    async def close(self) -> None:
        """See ``AbstractResolver.close``."""
        await self._resolver.close()
