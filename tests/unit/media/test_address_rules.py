"""Which addresses media may be downloaded from, however an address is written."""

import pytest

from vllm_mm_ext.media.fetch.address_rules import AddressRules, is_literal

ANY, PUBLIC = AddressRules(allow_private=True), AddressRules(allow_private=False)

NEVER = [
    "169.254.169.254",
    "169.254.0.1",
    "169.254.170.2",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "fd00:42::42",
    # The same IPv4 addresses, embedded in IPv6 ones.
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "::169.254.169.254",
    "::ffff:0:169.254.169.254",
    "2002:a9fe:a9fe::1",
    "2001:0:4136:e378:8000:63bf:5601:5601",  # Teredo: 169.254.169.254, inverted
    "64:ff9b::169.254.169.254",
    "64:ff9b::6464:64c8",
    "64:ff9b:1:a9fe:a9:fe00::",  # RFC 6052: a prefix of 48 bits
    "64:ff9b:1:a9:fe:a9fe::",  # 56 bits
    "64:ff9b:1:0:a9:fea9:fe00::",  # 64 bits
    "64:ff9b:1::169.254.169.254",  # 96 bits
]
PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fc00::1",
    "fd12:3456::1",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "::ffff:0:127.0.0.1",
    "2002:7f00:1::",
    "64:ff9b::127.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::8.8.8.8",
]
OPEN = [
    "8.8.8.8",
    "172.15.255.255",
    "172.32.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "168.63.129.17",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]


@pytest.mark.parametrize("address", NEVER)
def test_link_local_and_metadata_addresses_are_never_allowed(address: str) -> None:
    assert not ANY.allows(address)
    assert not PUBLIC.allows(address)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_allowed_by_one_switch(address: str) -> None:
    assert ANY.allows(address)
    assert not PUBLIC.allows(address)


@pytest.mark.parametrize("address", OPEN)
def test_public_addresses_are_always_allowed(address: str) -> None:
    assert ANY.allows(address)
    assert PUBLIC.allows(address)


@pytest.mark.parametrize("text", ["127.1", "2130706433", "0177.0.0.1", "1.2.3.4.", "²", "::x", ""])
def test_what_is_no_address_in_full_is_not_judged(text: str) -> None:
    with pytest.raises(ValueError, match="IPv4 or IPv6"):
        ANY.allows(text)


def test_hosts_of_digits_or_with_a_colon_are_literals() -> None:
    assert all(is_literal(host) for host in ("1.2.3.4", "127.1", "2130706433", "::1", "1.2.3.4."))
    assert not any(is_literal(host) for host in ("example.org", "0x7f.1", "1.2.3.4.example", "a"))
