"""Which network addresses media may be downloaded from.

A client names the host that the server then contacts, so the server must not be led to services
that trust it because of where it stands (server-side request forgery). Pure functions over
addresses: whoever connects asks here first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address

# Services of clouds that give credentials to whoever can reach them, outside the link-local range:
# AWS (metadata, DNS, time and EKS pod identity over IPv6), Google Cloud and Scaleway over IPv6,
# Alibaba Cloud, Oracle Cloud, and Azure's WireServer.
_METADATA: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(text)
    for text in (
        "fd00:ec2::/32",
        "fd20:ce::254/128",
        "fd00:42::42/128",
        "100.100.100.200/32",
        "192.0.0.192/32",
        "168.63.129.16/32",
    )
)
# IPv6 addresses whose last 32 bits are an IPv4 address: IPv4-mapped (RFC 4291), IPv4-compatible
# (deprecated there), IPv4-translated (RFC 2765) and NAT64's own prefix (RFC 6052).
_IPV4_AT_THE_END = tuple(
    IPv6Network(text) for text in ("::ffff:0:0/96", "::/96", "::ffff:0:0:0/96", "64:ff9b::/96")
)
# NAT64 prefixes of a network's own choice (RFC 8215). The length of the prefix is not known, and
# with it the place of the IPv4 address.
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")


@dataclass(frozen=True)
class AddressRules:
    """Tells the addresses that may be contacted from those that may not.

    Link-local addresses and the metadata services of clouds are never allowed.

    Args:
        allow_private: Allow loopback, private (RFC 1918), unique local, shared (carrier-grade
            NAT), multicast, unspecified, documentation and reserved addresses.
    """

    allow_private: bool

    def allows(self, text: str) -> bool:
        """Return whether an address may be contacted, however it is written.

        IPv6 addresses that stand for an IPv4 address are judged as both.

        Args:
            text: An IP address, with or without a zone (``fe80::1%eth0``).

        Raises:
            ValueError: ``text`` is not an IP address.
        """
        address = ip_address(text)
        if address in IPv6Network("::/128") or address in IPv6Network("::1/128"):
            return self.allow_private  # Not IPv4-compatible addresses, in spite of their range.
        return all(self._allows(form) for form in (address, *_embedded(address)))

    def _allows(self, address: Address) -> bool:
        if address.is_link_local or any(address in network for network in _METADATA):
            return False
        return self.allow_private or not _is_private(address)


def is_literal(host: str) -> bool:
    """Return whether a host is written as an IP address, rightly or not, rather than as a name."""
    return ":" in host or host.replace(".", "").isdigit()


def _is_private(address: Address) -> bool:
    if isinstance(address, IPv6Address):
        if any(address in network for network in _IPV4_AT_THE_END):
            return False  # The IPv4 address decides.
        if address.is_site_local or address in _LOCAL_NAT64:
            return True
    return not address.is_global or address.is_multicast or address.is_reserved


def _embedded(address: Address) -> Iterator[IPv4Address]:
    """IPv4 addresses that a gateway or the kernel may contact in place of an IPv6 address."""
    if isinstance(address, IPv4Address):
        return
    number = int(address)
    if any(address in network for network in _IPV4_AT_THE_END):
        yield IPv4Address(number & 0xFFFFFFFF)
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _LOCAL_NAT64:
        # RFC 6052 section 2.2: bits 64 to 71 are skipped.
        low = number & ((1 << 56) - 1)
        yield IPv4Address(number & 0xFFFFFFFF)  # /96
        yield IPv4Address(low >> 24)  # /64
        yield IPv4Address((number >> 64 & 0xFF) << 24 | low >> 32)  # /56
        yield IPv4Address((number >> 64 & 0xFFFF) << 16 | low >> 40)  # /48
