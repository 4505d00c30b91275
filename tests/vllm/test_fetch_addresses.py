"""No URL leads the server to an address it must not contact, on any hop, by any spelling."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from digests import digest_of

from vllm_mm_ext.adapters import runtime as runtime_module
from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector
from vllm_mm_ext.adapters.runtime import attach_runtime, current_runtime
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.errors import ForbiddenMediaError, MediaError, UnreachableMediaError
from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.media.fetch.fetcher import MediaFetcher
from vllm_mm_ext.media.loop_thread import LoopThread
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.plugin import warn_of_private_addresses
from vllm_mm_ext.testing.origin import Origin, Resource

BODY = bytes(range(256)) * 10
DIGEST = digest_of(BODY)
MakeFetcher = Callable[..., MediaFetcher]


class NameTable(AbstractResolver):
    """Name servers whose answers a test writes down: per host, the answers one after another."""

    def __init__(self, answers: Mapping[str, list[list[str]]]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        del family
        answers = self.answers[host]
        addresses = answers[min(self.asked.count(host), len(answers) - 1)]
        self.asked.append(host)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


@pytest.fixture
def make_fetcher() -> Iterator[MakeFetcher]:
    made: list[MediaFetcher] = []

    def make(names: NameTable | None = None, **settings: Any) -> MediaFetcher:
        cache: ByteBudgetCache[str, Blob] = ByteBudgetCache(1 << 20, len)
        if names is not None:
            settings["make_resolver"] = lambda: names
        options: dict[str, Any] = {
            "allowed_local_media_path": None,
            "allowed_media_domains": [],
            "allow_redirects": True,
            "user_agent": "test/1",
            "loop": LoopThread("fetch"),
            "budget": MediaBudget(1 << 30),
            "encoded_cache": cache,
            "download_limit_bytes": None,
            "local_limit_bytes": None,
            "max_retries": 1,
            "retry_pause_s": 0.0,
        }
        made.append(MediaFetcher(**(options | settings)))
        return made[-1]

    yield make
    for fetcher in made:
        fetcher._thread.stop(fetcher.disconnect())


async def digest(fetcher: MediaFetcher, url: str) -> str:
    return (await fetcher.resolve(url, timeout_s=10)).digest


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "100.100.100.200",
        "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:a9fe]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a9fe:a9fe::]",
        # Spellings that are names to aiohttp and addresses to the system's resolver.
        "0xa9fea9fe",
        "0xa9.0xfe.0xa9.0xfe",
        "169.254.0xa9fe",
    ],
)
@pytest.mark.parametrize("as_redirect", [False, True])
async def test_metadata_services_are_refused_by_any_spelling_and_on_every_hop(
    origin: Origin, make_fetcher: MakeFetcher, host: str, as_redirect: bool
) -> None:
    url = f"http://{host}/latest/meta-data/"
    if as_redirect:
        url = origin.serve("/a", Resource(status=302, location=url))
    with pytest.raises(ForbiddenMediaError, match="does not download media from"):
        await digest(make_fetcher(), url)


@pytest.mark.parametrize("host", ["2852039166", "169.254.43518", "0251.0376.0251.0376", "127.1"])
async def test_addresses_not_written_in_full_are_refused(
    make_fetcher: MakeFetcher, host: str
) -> None:
    with pytest.raises(MediaError):
        await digest(make_fetcher(), f"http://{host}/")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
async def test_private_addresses_are_refused_where_the_operator_says_so(
    origin: Origin, make_fetcher: MakeFetcher, host: str
) -> None:
    origin.serve("/a", Resource(BODY))
    with pytest.raises(ForbiddenMediaError):
        await digest(make_fetcher(allow_private_addresses=False), origin.url("/a", host))
    assert not origin.requests
    assert await digest(make_fetcher(), origin.url("/a", host)) == DIGEST


async def test_a_name_is_refused_when_it_leads_to_such_an_address(
    origin: Origin, make_fetcher: MakeFetcher
) -> None:
    names = NameTable({"metadata.test": [["169.254.169.254"]], "inside.test": [["127.0.0.1"]]})
    origin.serve("/a", Resource(BODY))
    for private, host in (
        (True, "metadata.test"),
        (False, "metadata.test"),
        (False, "inside.test"),
    ):
        fetcher = make_fetcher(names, allow_private_addresses=private)
        with pytest.raises(ForbiddenMediaError, match=host) as caught:
            await digest(fetcher, origin.url("/a", host))
        # Clients learn nothing about the network from the message.
        assert "169.254" not in str(caught.value)
        assert "127.0" not in str(caught.value)
    assert not origin.requests


async def test_only_the_allowed_addresses_of_a_name_are_contacted(
    origin: Origin, make_fetcher: MakeFetcher
) -> None:
    names = NameTable({"both.test": [["169.254.169.254", "127.0.0.1"]]})
    origin.serve("/a", Resource(BODY))
    assert await digest(make_fetcher(names), origin.url("/a", "both.test")) == DIGEST


async def test_the_address_that_was_checked_is_the_one_contacted(
    origin: Origin, make_fetcher: MakeFetcher
) -> None:
    # DNS rebinding: the first answer passes the check, the second would lead inside. The public
    # address is one that is no longer routed (RFC 7526), so that nobody is contacted.
    names = NameTable({"rebind.test": [["192.88.99.1"], ["127.0.0.1"]]})
    url = origin.serve("/a", Resource(BODY)).replace("127.0.0.1", "rebind.test")
    fetcher = make_fetcher(names, allow_private_addresses=False)
    with pytest.raises(UnreachableMediaError):
        await fetcher.resolve(url, timeout_s=0.2)
    assert names.asked == ["rebind.test"]
    # Another attempt asks and checks again.
    with pytest.raises(ForbiddenMediaError):
        await make_fetcher(names, allow_private_addresses=False).resolve(url, timeout_s=0.2)
    assert not origin.requests


async def test_a_name_is_resolved_once_for_a_download(
    origin: Origin, make_fetcher: MakeFetcher
) -> None:
    names = NameTable({"rebind.test": [["127.0.0.1"], ["169.254.169.254"]]})
    url = origin.serve("/a", Resource(BODY)).replace("127.0.0.1", "rebind.test")
    assert await digest(make_fetcher(names), url) == DIGEST
    assert names.asked == ["rebind.test"]


async def test_redirects_to_private_names_are_refused(
    origin: Origin, make_fetcher: MakeFetcher
) -> None:
    names = NameTable({"front.test": [["127.0.0.1"]], "metadata.test": [["169.254.169.254"]]})
    origin.serve("/a", Resource(status=302, location=origin.url("/b", "metadata.test")))
    with pytest.raises(ForbiddenMediaError, match=r"metadata\.test"):
        await digest(make_fetcher(names), origin.url("/a", "front.test"))
    assert origin.requests["/b"] == 0


async def test_an_allowed_domain_does_not_open_link_local_addresses(
    make_fetcher: MakeFetcher,
) -> None:
    fetcher = make_fetcher(allowed_media_domains=["169.254.169.254"])
    with pytest.raises(ForbiddenMediaError, match="does not download"):
        await digest(fetcher, "http://169.254.169.254/")


async def test_requests_carry_nothing_of_the_servers_environment(
    origin: Origin, make_fetcher: MakeFetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login server password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with Origin() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url("/"))
        monkeypatch.setenv("HTTP_PROXY", proxy.url("/"))
        assert await digest(make_fetcher(), origin.serve("/a", Resource(BODY))) == DIGEST
        assert not proxy.requests
    assert "authorization" not in origin.last_headers["/a"]


async def test_credentials_of_a_url_stay_with_its_host(
    origin: Origin, make_fetcher: MakeFetcher
) -> None:
    names = NameTable({"one.test": [["127.0.0.1"]], "two.test": [["127.0.0.1"]]})
    origin.serve("/a", Resource(status=302, location=origin.url("/b", "two.test")))
    origin.serve("/b", Resource(BODY, headers={"Set-Cookie": "id=1"}))
    fetcher = make_fetcher(names)
    url = origin.url("/a", "user:password@one.test")
    for _ in range(2):
        assert await digest(fetcher, url) == DIGEST
    token = base64.b64encode(b"user:password").decode()
    assert origin.last_headers["/a"]["authorization"] == f"Basic {token}"
    assert not {"authorization", "cookie"} & origin.last_headers["/b"].keys()


class TestConnector:
    """What stock code downloads (images, stock loaders) obeys the same rules."""

    @pytest.fixture(autouse=True)
    def detached(self) -> Iterator[None]:
        yield
        current_runtime().close()
        runtime_module._runtime = None

    @staticmethod
    def connector(fetch: dict[str, Any], **kwargs: Any) -> MMExtMediaConnector:
        settings = {"media": {"decode": {"workers": 1}, "fetch": fetch}}
        config = MMExtConfig.from_additional_config({"mm_ext": settings})
        attach_runtime(config, ModelTraits())
        return MMExtMediaConnector(**kwargs)

    @pytest.mark.parametrize("modality", ["image", "video", "audio"])
    @pytest.mark.parametrize(
        "media_io_kwargs",
        [{}, {"video": {"video_backend": "opencv"}, "audio": {"audio_backend": "pyav"}}],
    )
    async def test_no_modality_and_no_loader_gets_round_the_rules(
        self, origin: Origin, modality: str, media_io_kwargs: dict[str, Any]
    ) -> None:
        connector = self.connector({"private_addresses": "refuse"}, media_io_kwargs=media_io_kwargs)
        metadata = "http://169.254.169.254/latest/meta-data/"
        for url in (metadata, origin.serve("/a", Resource(BODY))):
            with pytest.raises(Exception, match="does not download media from"):
                await getattr(connector, f"fetch_{modality}_async")(url)
            with pytest.raises(Exception, match="does not download media from"):
                await asyncio.to_thread(getattr(connector, f"fetch_{modality}"), url)
        assert not origin.requests


@pytest.mark.parametrize(
    ("media", "domains", "warnings"),
    [
        ({}, [], 1),
        ({}, None, 1),
        ({}, ["example.org"], 0),
        ({"enabled": False}, [], 0),
        ({"fetch": {"private_addresses": "allow"}}, [], 0),
        ({"fetch": {"private_addresses": "refuse"}}, [], 0),
    ],
)
def test_the_operator_is_told_once_unless_the_choice_was_made(
    media: dict[str, Any],
    domains: list[str] | None,
    warnings: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = MMExtConfig.from_additional_config({"mm_ext": {"media": media}})
    with caplog.at_level(logging.WARNING):
        warn_of_private_addresses(config.media, domains)
    told = [record for record in caplog.records if "private_addresses" in record.getMessage()]
    assert len(told) == warnings


async def test_a_name_without_an_address_is_unreachable(make_fetcher: MakeFetcher) -> None:
    with pytest.raises(UnreachableMediaError):
        await digest(make_fetcher(NameTable({"none.test": [[]]})), "http://none.test/")
