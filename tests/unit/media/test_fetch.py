import asyncio
import base64
import itertools
import math
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pybase64
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from digests import digest_of

from vllm_mm_ext.errors import (
    BusyError,
    ForbiddenMediaError,
    MediaError,
    MediaTooLargeError,
    OriginError,
    OriginTimeoutError,
    UnreachableMediaError,
)
from vllm_mm_ext.media.bounded_threads import BoundedThreads
from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.media.fetch import file_source
from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.media.fetch.data_url import is_jpeg_sequence
from vllm_mm_ext.media.fetch.fetcher import MediaChangedError, MediaFetcher, MediaRef
from vllm_mm_ext.media.fetch.file_source import FileSource
from vllm_mm_ext.media.fetch.freshness import freshness_fields, judge
from vllm_mm_ext.media.fetch.source import TimeLimit
from vllm_mm_ext.media.loop_thread import LoopThread
from vllm_mm_ext.testing.origin import Origin, Resource

BODY = bytes(range(256)) * 1000
DIGEST = digest_of(BODY)
MakeFetcher = Callable[..., MediaFetcher]


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


@pytest.fixture
def make_fetcher(tmp_path: Path) -> Iterator[MakeFetcher]:
    made: list[MediaFetcher] = []

    def make(cache_bytes: int = 64 << 20, **settings: object) -> MediaFetcher:
        options: dict[str, object] = {
            "allowed_local_media_path": tmp_path,
            "allowed_media_domains": [],
            "allow_redirects": True,
            "user_agent": "test/1",
            "loop": LoopThread("fetch"),
            "budget": MediaBudget(1 << 30),
            "download_limit_bytes": 64 << 20,
            "local_limit_bytes": None,
            "max_retries": 1,
            "retry_pause_s": 0.01,
        }
        cache: ByteBudgetCache[str, Blob] = ByteBudgetCache(cache_bytes, len)
        fetcher = MediaFetcher(encoded_cache=cache, **(options | settings))  # type: ignore[arg-type]
        made.append(fetcher)
        return fetcher

    yield make
    for fetcher in made:
        fetcher._thread.stop(fetcher.disconnect())


async def get(fetcher: MediaFetcher, url: str, **kwargs: object) -> MediaRef:
    return await fetcher.resolve(url, **({"timeout_s": 10.0} | kwargs))  # type: ignore[arg-type]


def readers() -> BoundedThreads:
    return BoundedThreads(2, "test", "files")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as last changed long ago."""
    monkeypatch.setattr("vllm_mm_ext.media.fetch.file_source._RACY_NS", -1)


class TestHttp:
    async def test_delivers_the_bytes_and_their_digest(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a.mp4", Resource(BODY))
        ref = await get(make_fetcher(), url)
        assert (ref.digest, ref.size) == (DIGEST, len(BODY))
        assert (await ref.open()).read() == BODY
        assert origin.last_headers["/a.mp4"]["user-agent"] == "test/1"

    async def test_without_validators_it_is_downloaded_again_but_keeps_its_digest(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY))
        fetcher = make_fetcher()
        assert [(await get(fetcher, url)).digest for _ in range(3)] == [DIGEST] * 3
        assert origin.body_bytes["/a"] == 3 * len(BODY)

    @pytest.mark.parametrize(
        "validator", [{"etag": '"v1"'}, {"last_modified": formatdate(1.6e9, usegmt=True)}]
    )
    async def test_validator_makes_a_follow_up_cost_no_body(
        self, origin: Origin, make_fetcher: MakeFetcher, validator: dict[str, str]
    ) -> None:
        url = origin.serve("/a", Resource(BODY, **validator))  # type: ignore[arg-type]
        fetcher = make_fetcher()
        for _ in range(4):
            ref = await get(fetcher, url)
            assert ref.digest == DIGEST
            assert (await ref.open()).read() == BODY
        assert (origin.requests["/a"], origin.body_bytes["/a"]) == (4, len(BODY))
        assert origin.statuses["/a", 304] == 3
        stats = fetcher.stats()
        assert (stats["http_requests"], stats["http_not_modified"]) == (4, 3)
        assert (stats["http_bodies"], stats["http_body_bytes"]) == (1, len(BODY))

    async def test_changed_content_is_seen_through_its_etag(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        fetcher = make_fetcher()
        url = origin.serve("/a", Resource(BODY, etag='"v1"'))
        await get(fetcher, url)
        origin.serve("/a", Resource(b"new", etag='"v2"'))
        assert (await get(fetcher, url)).digest == digest_of(b"new")

    async def test_fresh_response_costs_no_request(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, headers={"Cache-Control": "max-age=60"}))
        fetcher = make_fetcher()
        for _ in range(3):
            assert (await get(fetcher, url)).digest == DIGEST
        assert origin.requests["/a"] == 1

    async def test_304_renews_the_lifetime(self, origin: Origin, make_fetcher: MakeFetcher) -> None:
        fetcher = make_fetcher()
        url = origin.serve("/a", Resource(BODY, etag='"v"', headers={"Cache-Control": "no-cache"}))
        await get(fetcher, url)
        origin.serve("/a", Resource(BODY, etag='"v"', headers={"Cache-Control": "max-age=60"}))
        for _ in range(3):
            assert (await get(fetcher, url)).digest == DIGEST
        assert (origin.requests["/a"], origin.body_bytes["/a"]) == (2, len(BODY))

    async def test_no_store_is_kept_nowhere(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, etag='"v"', headers={"Cache-Control": "no-store"}))
        fetcher = make_fetcher()
        for _ in range(2):
            ref = await get(fetcher, url)
            assert not ref.storable
            assert (await ref.open()).read() == BODY
        assert origin.body_bytes["/a"] == 2 * len(BODY)
        assert len(fetcher.encoded_cache) == 0

    async def test_evicted_bytes_are_downloaded_again_on_open_only(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, etag='"v"'))
        fetcher = make_fetcher()
        await get(fetcher, url)
        fetcher.encoded_cache.clear()
        ref = await get(fetcher, url)
        assert origin.body_bytes["/a"] == len(BODY)
        assert (await ref.open()).read() == BODY
        assert origin.body_bytes["/a"] == 2 * len(BODY)

    async def test_content_that_changed_before_open_is_never_passed_off_as_the_old(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, headers={"Cache-Control": "max-age=60"}))
        fetcher = make_fetcher()
        await get(fetcher, url)
        fetcher.encoded_cache.clear()
        ref = await get(fetcher, url)
        origin.serve("/a", Resource(b"new"))
        with pytest.raises(MediaChangedError):
            await ref.open()
        assert (await get(fetcher, url)).digest == digest_of(b"new")

    async def test_concurrent_requests_download_once(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, delay_s=0.2))
        fetcher = make_fetcher()
        refs = await asyncio.gather(*(get(fetcher, url) for _ in range(64)))
        assert {ref.digest for ref in refs} == {DIGEST}
        assert origin.requests["/a"] == 1

    async def test_cancelled_download_leaves_no_descriptor_and_no_download(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        release = threading.Event()
        url = origin.serve("/a", Resource(BODY, hold=release))
        fetcher = make_fetcher()
        await get(fetcher, origin.serve("/warm-up", Resource(b"x")))
        memfds = _count_memfds()
        task = asyncio.create_task(get(fetcher, url))
        while not origin.body_bytes["/a"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while _count_memfds() > memfds or len(fetcher._flights):
            await asyncio.sleep(0.01)
        release.set()

    def test_serves_one_event_loop_after_another(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, etag='"v"'))
        fetcher = make_fetcher()
        assert [asyncio.run(get(fetcher, url)).digest for _ in range(3)] == [DIGEST] * 3
        assert origin.body_bytes["/a"] == len(BODY)

    async def test_urls_with_other_credentials_are_remembered_apart(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, headers={"Cache-Control": "max-age=60"}))
        fetcher = make_fetcher()
        await get(fetcher, url.replace("//", "//user:one@"))
        token = base64.b64encode(b"user:one").decode()
        assert origin.last_headers["/a"]["authorization"] == f"Basic {token}"
        await get(fetcher, url.replace("//", "//user:two@"))
        assert origin.requests["/a"] == 2

    async def test_encoded_path_and_query_arrive_as_sent(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        path = "/a%2Fb%20c?sig=x%2By%3D&u=%C3%A9"
        url = origin.serve(path, Resource(BODY))
        assert (await get(make_fetcher(), url + "#t=1,2")).digest == DIGEST


class TestHttpLimits:
    @pytest.mark.parametrize("chunked", [False, True])
    async def test_size_limit_holds_with_and_without_content_length(
        self, origin: Origin, make_fetcher: MakeFetcher, chunked: bool
    ) -> None:
        url = origin.serve("/a", Resource(BODY, chunked=chunked))
        fetcher = make_fetcher(download_limit_bytes=len(BODY))
        assert (await get(fetcher, url)).digest == DIGEST
        with pytest.raises(MediaTooLargeError, match=f"limit is {len(BODY) - 1} bytes"):
            await get(fetcher, url, max_bytes=len(BODY) - 1)
        with pytest.raises(MediaTooLargeError):
            await get(make_fetcher(download_limit_bytes=1000), url)

    async def test_announced_size_past_the_limit_is_refused_before_the_body(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        release = threading.Event()
        url = origin.serve("/a", Resource(b"", content_length=1 << 40, hold=release))
        with pytest.raises(MediaTooLargeError):
            await get(make_fetcher(), url)

    async def test_size_limit_holds_for_remembered_media(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        fetcher = make_fetcher()
        for path, headers in (("/fresh", {"Cache-Control": "max-age=60"}), ("/etag", {})):
            url = origin.serve(path, Resource(BODY, etag='"v"', headers=headers))
            await get(fetcher, url)
            with pytest.raises(MediaTooLargeError):
                await get(fetcher, url, max_bytes=10)

    async def test_slow_body_runs_into_the_timeout(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        release = threading.Event()
        url = origin.serve("/a", Resource(BODY, hold=release))
        with pytest.raises(OriginTimeoutError, match=r"0\.2 s"):
            await get(make_fetcher(), url, timeout_s=0.2)
        release.set()

    async def test_a_download_that_its_time_is_too_short_for_tells_which_variable_to_raise(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, bytes_per_s=10_000))
        fetcher = make_fetcher(max_retries=2)
        limit = TimeLimit(0.05, "VLLM_VIDEO_FETCH_TIMEOUT")
        with pytest.raises(
            OriginTimeoutError,
            match=r"in 0\.2 s\. VLLM_VIDEO_FETCH_TIMEOUT is the time of",
        ):
            await get(fetcher, url, timeout_s=limit)
        gone = origin.serve("/b", Resource(status=500))
        with pytest.raises(OriginError) as refused:
            await get(fetcher, gone, timeout_s=limit)
        assert "VLLM" not in refused.value.message

    async def test_slow_origins_hold_up_no_other_origin(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        fetcher, release = make_fetcher(), threading.Event()
        slow = [origin.serve(f"/{i}", Resource(BODY, hold=release)) for i in range(101)]
        tasks = [asyncio.create_task(get(fetcher, url)) for url in slow]
        while sum(origin.requests.values()) < 100:
            await asyncio.sleep(0.01)
        origin.serve("/a", Resource(BODY))
        assert (await get(fetcher, origin.url("/a", "localhost"))).digest == DIGEST
        release.set()
        assert {(await task).digest for task in tasks} == {DIGEST}

    async def test_the_wait_for_others_downloads_from_a_host_is_not_the_hosts_fault(
        self, origin: Origin, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vllm_mm_ext.media.fetch.http_source._PER_HOST", 1)
        fetcher, release = make_fetcher(), threading.Event()
        fetcher.budget.max_wait_s = 0.05
        slow = origin.serve("/slow", Resource(BODY, hold=release))
        first = asyncio.create_task(get(fetcher, slow))
        while not origin.requests["/slow"]:
            await asyncio.sleep(0.01)
        url = origin.serve("/a", Resource(BODY))
        with pytest.raises(BusyError):
            await get(fetcher, url)
        # As where no client would send the request again.
        fetcher.budget.max_wait_s = math.inf
        patient = asyncio.create_task(get(fetcher, url))
        await asyncio.sleep(0.1)
        release.set()
        await first
        assert (await patient).digest == DIGEST

    @pytest.mark.parametrize(
        ("status", "headers"),
        [
            (203, {}),
            (206, {"Content-Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"}),
            (206, {"Content-Range": f"Bytes  0-{len(BODY) - 1}/{len(BODY)} "}),
        ],
    )
    @pytest.mark.parametrize("chunked", [False, True])
    async def test_answers_that_hold_all_of_the_content_are_taken(
        self,
        origin: Origin,
        make_fetcher: MakeFetcher,
        status: int,
        headers: dict[str, str],
        chunked: bool,
    ) -> None:
        resource = Resource(BODY, status=status, headers=headers, chunked=chunked)
        ref = await get(make_fetcher(), origin.serve("/a", resource))
        assert (ref.digest, ref.size) == (DIGEST, len(BODY))


class TestHttpFailures:
    @pytest.mark.parametrize(
        ("content_range", "error"),
        [
            (f"bytes 0-{len(BODY) - 1}/{len(BODY) + 1}", UnreachableMediaError),
            (f"bytes 1-{len(BODY)}/{len(BODY) + 1}", UnreachableMediaError),
            (f"bytes 0-{len(BODY) - 1}/*", UnreachableMediaError),
            ("", UnreachableMediaError),
            # The origin says that this is all, and sends less.
            (f"bytes 0-{len(BODY)}/{len(BODY) + 1}", OriginError),
        ],
    )
    async def test_a_part_is_not_taken_for_the_whole(
        self, origin: Origin, make_fetcher: MakeFetcher, content_range: str, error: type[MediaError]
    ) -> None:
        headers = {"Content-Range": content_range}
        url = origin.serve("/a", Resource(BODY, status=206, headers=headers))
        with pytest.raises(error):
            await get(make_fetcher(), url)

    @pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 503, 204, 206])
    async def test_an_error_names_status_and_host_and_nothing_else(
        self, origin: Origin, make_fetcher: MakeFetcher, status: int
    ) -> None:
        url = origin.serve("/a?secret=hunter2", Resource(status=status))
        with pytest.raises(UnreachableMediaError) as caught:
            await get(make_fetcher(), url.replace("//", "//user:password@"))
        assert f"127.0.0.1 answered HTTP {status}" in str(caught.value)
        for secret in ("hunter2", "password", "/a"):
            assert secret not in str(caught.value)

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            *((status, UnreachableMediaError) for status in (204, 206, 400, 401, 403, 404, 410)),
            *((status, OriginError) for status in (408, 429, 500, 502, 503, 504)),
        ],
    )
    async def test_who_is_at_fault_shows_in_the_type_of_the_error(
        self, origin: Origin, make_fetcher: MakeFetcher, status: int, error: type[MediaError]
    ) -> None:
        with pytest.raises(MediaError) as caught:
            await get(make_fetcher(), origin.serve("/a", Resource(status=status)))
        assert type(caught.value) is error
        assert caught.value.value == status

    async def test_an_origin_that_is_not_there_or_speaks_no_http_is_to_blame(
        self, make_fetcher: MakeFetcher
    ) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
            with pytest.raises(MediaError) as caught:
                await get(make_fetcher(), url)
        assert type(caught.value) is OriginError

        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-server\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            with pytest.raises(MediaError) as caught:
                await get(make_fetcher(), url)
        assert type(caught.value) is OriginError

    @pytest.mark.parametrize(
        ("errno", "error"),
        [(socket.EAI_NONAME, UnreachableMediaError), (socket.EAI_AGAIN, OriginError)],
    )
    async def test_a_name_that_does_not_exist_is_the_clients_fault_and_silence_is_not(
        self, make_fetcher: MakeFetcher, errno: int, error: type[MediaError]
    ) -> None:
        class Failing(AbstractResolver):
            async def resolve(self, *_: object) -> list[ResolveResult]:
                raise socket.gaierror(errno, "no answer")

            async def close(self) -> None:
                pass

        with pytest.raises(MediaError, match=r"cannot be resolved") as caught:
            await get(make_fetcher(make_resolver=Failing), "http://name.test/")
        assert type(caught.value) is error

    @pytest.mark.parametrize(
        "url", ["http://127.0.0.1:9/a?hunter2", "http://does-not-exist.invalid/a?hunter2"]
    )
    async def test_an_error_about_a_connection_does_not_quote_the_url(
        self, make_fetcher: MakeFetcher, url: str
    ) -> None:
        with pytest.raises(UnreachableMediaError) as caught:
            await get(make_fetcher(), url)
        assert "hunter2" not in str(caught.value)

    async def test_truncated_body_is_not_taken_for_the_media(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, content_length=len(BODY) + 1))
        fetcher = make_fetcher()
        with pytest.raises(OriginError, match="broke off"):
            await get(fetcher, url)
        assert len(fetcher.encoded_cache) == 0

    async def test_transient_failures_are_tried_again(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, fail_first=2))
        assert (await get(make_fetcher(max_retries=3), url)).digest == DIGEST
        origin.serve("/a", Resource(BODY, fail_first=2))
        with pytest.raises(OriginError, match="HTTP 503"):
            await get(make_fetcher(max_retries=2), url)

    async def test_client_errors_are_not_tried_again(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(status=404))
        with pytest.raises(UnreachableMediaError):
            await get(make_fetcher(max_retries=3), url)
        assert origin.requests["/a"] == 1

    async def test_failure_is_not_remembered(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        fetcher = make_fetcher()
        with pytest.raises(UnreachableMediaError):
            await get(fetcher, origin.url("/a"))
        assert (await get(fetcher, origin.serve("/a", Resource(BODY)))).digest == DIGEST

    @pytest.mark.parametrize(
        "url",
        [
            "http://",
            "http:///a",
            "http://[::1/a",
            "http://a b/c",
            "http://evil\nhost/",
            "http://h:99999999/a",
            "https://user@:80/",
            "http://a..b/x",
            f"http://{'a' * 70}.test/x",
            "http://€:p@host.test/",
            "http://u:%E2%82%AC@host.test/",
            "http://a%3Ab:p@host.test/",
        ],
    )
    async def test_malformed_url_is_a_client_error(
        self, make_fetcher: MakeFetcher, url: str
    ) -> None:
        fetcher = make_fetcher()
        with pytest.raises(MediaError) as caught:
            await get(fetcher, url)
        assert type(caught.value) is MediaError
        assert fetcher.stats()["http_requests"] == 0

    @pytest.mark.parametrize(
        "url", ["ftp://h/a", "a.mp4", "/etc/passwd", "", "gopher://h", "s3://b/k"]
    )
    async def test_other_schemes_are_forbidden_and_the_allowed_ones_named(
        self, make_fetcher: MakeFetcher, url: str
    ) -> None:
        with pytest.raises(ForbiddenMediaError, match="http, https, file or data"):
            await get(make_fetcher(), url)


class TestDomainsAndRedirects:
    async def test_only_allowed_domains_are_contacted(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY))
        fetcher = make_fetcher(allowed_media_domains=["localhost"])
        with pytest.raises(ForbiddenMediaError, match=r"127\.0\.0\.1"):
            await get(fetcher, url)
        assert origin.requests["/a"] == 0
        assert (await get(fetcher, origin.url("/a", "LOCALHOST"))).digest == DIGEST

    @pytest.mark.parametrize(
        "trick",
        [
            "http://localhost@127.0.0.1:{p}/a",
            "http://127.0.0.1:{p}\\@localhost/a",
            "http://127.0.0.1:{p}#@localhost/a",
            "http://127.0.0.1:{p}?@localhost/a",
            "http://localhost.:{p}/a",
            "http://[::ffff:127.0.0.1]:{p}/a",
        ],
    )
    async def test_disguised_hosts_are_not_contacted(
        self, origin: Origin, make_fetcher: MakeFetcher, trick: str
    ) -> None:
        port = origin.url("").rpartition(":")[2]
        with pytest.raises(ForbiddenMediaError):
            await get(make_fetcher(allowed_media_domains=["localhost"]), trick.replace("{p}", port))
        assert not origin.requests

    async def test_redirect_to_another_domain_is_checked_too(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        target = origin.serve("/secret", Resource(BODY))
        origin.serve("/a", Resource(status=302, location=target))
        fetcher = make_fetcher(allowed_media_domains=["localhost"])
        with pytest.raises(ForbiddenMediaError):
            await get(fetcher, origin.url("/a", "localhost"))
        assert origin.requests["/secret"] == 0

    @pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://h/a", "data:,x", "http://["])
    async def test_redirect_cannot_leave_http(
        self, origin: Origin, make_fetcher: MakeFetcher, target: str
    ) -> None:
        url = origin.serve("/a", Resource(status=302, location=target))
        with pytest.raises(MediaError):
            await get(make_fetcher(), url)

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_relative_redirects_are_followed(
        self, origin: Origin, make_fetcher: MakeFetcher, status: int
    ) -> None:
        url = origin.serve("/x/a", Resource(status=status, location="../b?q=1"))
        origin.serve("/b?q=1", Resource(BODY))
        assert (await get(make_fetcher(), url)).digest == DIGEST

    async def test_ten_redirects_are_followed_and_an_endless_chain_is_not(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        for hop in range(11):
            origin.serve(f"/{hop}", Resource(status=302, location=f"/{hop + 1}"))
        origin.serve("/11", Resource(BODY))
        assert (await get(make_fetcher(), origin.url("/1"))).digest == DIGEST
        with pytest.raises(UnreachableMediaError, match="more than 10"):
            await get(make_fetcher(), origin.url("/0"))

    async def test_redirects_can_be_turned_off(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(status=302, location="/b"))
        origin.serve("/b", Resource(BODY))
        with pytest.raises(ForbiddenMediaError, match="redirect"):
            await get(make_fetcher(allow_redirects=False), url)
        assert origin.requests["/b"] == 0

    async def test_target_is_revalidated_and_a_new_target_is_seen(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        fetcher = make_fetcher()
        url = origin.serve("/a", Resource(status=302, location="/b"))
        origin.serve("/b", Resource(BODY, etag='"v"', headers={"Cache-Control": "max-age=60"}))
        for _ in range(3):
            assert (await get(fetcher, url)).digest == DIGEST
        # The redirect has no lifetime of its own, so it is asked for each time.
        assert (origin.requests["/a"], origin.body_bytes["/b"]) == (3, len(BODY))
        origin.serve("/a", Resource(status=302, location="/c"))
        origin.serve("/c", Resource(b"other", etag='"v"'))
        assert (await get(fetcher, url)).digest == digest_of(b"other")

    async def test_credentials_are_not_sent_to_a_redirect_target(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(status=302, location=origin.url("/b", "localhost")))
        origin.serve("/b", Resource(BODY))
        await get(make_fetcher(), url.replace("//", "//user:password@"))
        assert "authorization" not in origin.last_headers["/b"]

    async def test_cookies_are_not_carried_between_requests(
        self, origin: Origin, make_fetcher: MakeFetcher
    ) -> None:
        url = origin.serve("/a", Resource(BODY, headers={"Set-Cookie": "id=1"}))
        fetcher = make_fetcher()
        await get(fetcher, url)
        await get(fetcher, url)
        assert "cookie" not in origin.last_headers["/a"]


class TestFreshness:
    NOW = 1.7e9

    @pytest.mark.parametrize(
        ("headers", "storable", "lifetime"),
        [
            ({}, True, 0),
            ({"cache-control": "max-age=60"}, True, 60),
            ({"cache-control": "public, MAX-AGE=60 , must-revalidate"}, True, 60),
            ({"cache-control": 'max-age="60"'}, True, 60),
            ({"cache-control": "max-age=60, max-age=90"}, True, 60),
            ({"cache-control": "max-age=60", "age": "20"}, True, 40),
            ({"cache-control": "max-age=60", "age": "100"}, True, 0),
            ({"cache-control": "max-age=60", "date": formatdate(NOW - 45)}, True, 15),
            ({"cache-control": "max-age=60", "date": formatdate(NOW + 45)}, True, 60),
            ({"cache-control": "max-age=-1"}, True, 0),
            ({"cache-control": "max-age=soon"}, True, 0),
            ({"cache-control": "max-age=" + "9" * 5000}, True, 2**31),
            ({"cache-control": "s-maxage=60"}, True, 0),
            ({"cache-control": "private, max-age=60"}, True, 60),
            ({"cache-control": "no-cache, max-age=60"}, True, 0),
            ({"cache-control": "max-age=60", "vary": "*"}, True, 0),
            ({"cache-control": "max-age=60", "vary": "Accept-Encoding"}, True, 60),
            ({"cache-control": "No-Store, max-age=60"}, False, 0),
            ({"expires": formatdate(NOW + 30), "date": formatdate(NOW)}, True, 30),
            ({"expires": formatdate(NOW + 30)}, True, 30),
            ({"expires": formatdate(NOW - 30), "date": formatdate(NOW)}, True, 0),
            ({"expires": "0"}, True, 0),
            ({"expires": formatdate(NOW + 30), "cache-control": "max-age=5"}, True, 5),
        ],
    )
    def test_follows_rfc_9111(
        self, headers: dict[str, str], storable: bool, lifetime: float
    ) -> None:
        verdict = judge(headers, received=self.NOW, delay_s=0.0)
        assert (verdict.storable, verdict.lifetime_s) == (storable, lifetime)

    def test_time_spent_waiting_for_the_answer_counts_as_age(self) -> None:
        assert judge({"cache-control": "max-age=60"}, received=self.NOW, delay_s=5).lifetime_s == 55

    def test_repeated_fields_are_joined(self) -> None:
        fields = freshness_fields([("Cache-Control", "max-age=60"), ("cache-control", "no-store")])
        assert not judge(fields, received=self.NOW, delay_s=0).storable


class TestFile:
    async def test_delivers_the_bytes(self, tmp_path: Path, make_fetcher: MakeFetcher) -> None:
        path = tmp_path / "sub dir" / "ä.mp4"
        path.parent.mkdir()
        path.write_bytes(BODY)
        ref = await get(make_fetcher(), path.as_uri())
        assert (ref.digest, (await ref.open()).read()) == (DIGEST, BODY)

    @pytest.mark.usefixtures("settled")
    async def test_follow_up_does_not_read_the_file(
        self, tmp_path: Path, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(BODY)
        fetcher = make_fetcher()
        await get(fetcher, path.as_uri())

        def no_read(*_: object) -> bytes:
            raise AssertionError("the file was read")

        monkeypatch.setattr(os, "read", no_read)
        ref = await get(fetcher, path.as_uri())
        assert (ref.digest, (await ref.open()).read()) == (DIGEST, BODY)

    @pytest.mark.usefixtures("settled")
    async def test_changed_file_is_seen(self, tmp_path: Path, make_fetcher: MakeFetcher) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"one")
        fetcher = make_fetcher()
        assert (await get(fetcher, path.as_uri())).digest == digest_of(b"one")
        path.write_bytes(b"three")
        assert (await get(fetcher, path.as_uri())).digest == digest_of(b"three")

    async def test_same_size_change_right_after_reading_is_seen(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"one")
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        fetcher = make_fetcher()
        for content in (b"two", b"six", b"ten"):
            await get(fetcher, path.as_uri())
            path.write_bytes(content)
            os.utime(path, ns=times)
            assert (await get(fetcher, path.as_uri())).digest == digest_of(content)

    @pytest.mark.usefixtures("settled")
    async def test_restored_modification_time_does_not_hide_a_change(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"one")
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        fetcher = make_fetcher()
        await get(fetcher, path.as_uri())
        time.sleep(0.05)  # longer than one tick of the file system's clock
        path.write_bytes(b"two")
        os.utime(path, ns=times)
        assert (await get(fetcher, path.as_uri())).digest == digest_of(b"two")

    @pytest.mark.usefixtures("settled")
    async def test_swapped_link_is_seen(self, tmp_path: Path, make_fetcher: MakeFetcher) -> None:
        for name in ("one", "two"):
            (tmp_path / name).write_text(name)
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "one")
        fetcher = make_fetcher()
        assert (await get(fetcher, link.as_uri())).digest == digest_of(b"one")
        link.unlink()
        link.symlink_to(tmp_path / "two")
        assert (await get(fetcher, link.as_uri())).digest == digest_of(b"two")

    @pytest.mark.usefixtures("settled")
    async def test_evicted_file_that_changed_is_not_passed_off_as_the_old(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"one")
        fetcher = make_fetcher(cache_bytes=0)
        await get(fetcher, path.as_uri())
        ref = await get(fetcher, path.as_uri())
        path.write_bytes(b"other")
        with pytest.raises(MediaChangedError):
            await ref.open()

    @pytest.mark.usefixtures("settled")
    @pytest.mark.parametrize(
        ("change", "delivered"),
        [
            ("grows", True),
            ("is renamed", True),
            ("is rewritten alike", True),
            ("is rewritten", False),
            ("is rewritten larger", False),
            ("is rewritten, and its time restored", False),
            ("shrinks", False),
            ("is cut before it is read", False),
        ],
    )
    async def test_a_file_that_changes_while_it_is_read_is_delivered_as_it_was_or_not(
        self,
        tmp_path: Path,
        make_fetcher: MakeFetcher,
        monkeypatch: pytest.MonkeyPatch,
        change: str,
        delivered: bool,
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(BODY)
        os.utime(path, ns=(0, 0))
        reading = file_source.read_blob
        rewritten = {
            "is rewritten alike": BODY,
            "is rewritten": b"x" * len(BODY),
            "is rewritten larger": b"x" * (len(BODY) + 1),
            "is rewritten, and its time restored": b"x" * len(BODY),
            "shrinks": BODY[1:],
        }

        def changing(fd: int, size: int, go_on: Callable[[], None]) -> Blob:
            if change == "grows":
                with path.open("ab") as file:
                    file.write(b"more")
            if change == "is cut before it is read":
                os.truncate(path, 1)
            blob = reading(fd, size, go_on)
            if change == "is renamed":
                path.rename(path.with_name("b")).rename(path)
            elif change in rewritten:
                path.write_bytes(rewritten[change])
                if "restored" in change:
                    os.utime(path, ns=(0, 0))
            return blob

        monkeypatch.setattr(file_source, "read_blob", changing)
        fetcher = make_fetcher()
        if not delivered:
            with pytest.raises(MediaChangedError):
                await get(fetcher, path.as_uri())
            return
        assert (await get(fetcher, path.as_uri())).digest == DIGEST
        monkeypatch.setattr(file_source, "read_blob", reading)
        # The digest is that of the bytes, not of a state that the file is in.
        assert (await get(fetcher, path.as_uri())).digest == digest_of(path.read_bytes())

    @pytest.mark.parametrize("size", [5000, 1000, 10])
    async def test_a_file_that_is_rewritten_while_the_media_budget_is_waited_for_is_the_new_one(
        self, tmp_path: Path, size: int
    ) -> None:
        path, budget = tmp_path / "a", MediaBudget(10_000)
        path.write_bytes(b"a" * 1000)
        first, second = budget.claim(), budget.claim()
        lease = await first.acquire(9_500)
        source = FileSource(tmp_path, threads=readers(), lookups=readers(), max_bytes=None)
        reading = asyncio.create_task(
            source.fetch(path, timeout_s=1.0, max_bytes=None, load=True, claim=second)
        )
        while not budget.stats()["waiting"]:
            await asyncio.sleep(0.001)
        path.write_bytes(b"b" * size)
        lease.release()
        fetched = await reading
        assert fetched.blob is not None
        assert fetched.blob.read() == b"b" * size
        assert budget.used == size

    async def test_a_recording_whose_growth_has_no_room_waits_for_it_again(
        self, tmp_path: Path
    ) -> None:
        path, budget = tmp_path / "a", MediaBudget(10_000)
        path.write_bytes(b"a" * 1000)
        first, second, third = budget.claim(), budget.claim(), budget.claim()
        leases = [await first.acquire(5_000), await third.acquire(4_500)]
        source = FileSource(tmp_path, threads=readers(), lookups=readers(), max_bytes=None)
        reading = asyncio.create_task(
            source.fetch(path, timeout_s=1.0, max_bytes=None, load=True, claim=second)
        )
        while not budget.stats()["waiting"]:
            await asyncio.sleep(0.001)
        path.write_bytes(b"a" * 6000)
        leases.pop().release()
        while not budget.stats()["waiting"]:
            await asyncio.sleep(0.001)
        leases.pop().release()
        fetched = await reading
        assert fetched.blob is not None
        assert fetched.blob.read() == b"a" * 6000
        assert budget.used == 6000

    async def test_a_file_that_grew_past_the_limit_while_it_waited_is_too_large(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, budget = tmp_path / "a", MediaBudget(10_000)
        path.write_bytes(b"a" * 1000)
        source = FileSource(tmp_path, threads=readers(), lookups=readers(), max_bytes=2000)
        look = source._look

        def looking(*asked: Any) -> Any:
            found = look(*asked)
            path.write_bytes(b"b" * 2001)
            return found

        monkeypatch.setattr(source, "_look", looking)
        with pytest.raises(MediaTooLargeError):
            await source.fetch(path, timeout_s=1.0, max_bytes=None, load=True, claim=budget.claim())
        assert budget.used == 0

    async def test_a_recording_in_progress_is_served_as_far_as_it_goes(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        path, ended = tmp_path / "a", threading.Event()
        path.write_bytes(BODY)

        def record() -> None:
            with path.open("ab", buffering=0) as file:
                for number in itertools.count():
                    if ended.is_set():
                        return
                    file.write(number.to_bytes(8))

        recording = threading.Thread(target=record)
        recording.start()
        try:
            fetcher = make_fetcher()
            blobs = [await (await get(fetcher, path.as_uri())).open() for _ in range(10)]
        finally:
            ended.set()
            recording.join()
        whole, sizes = path.read_bytes(), [blob.size for blob in blobs]
        assert sizes == sorted(sizes)
        assert all(whole.startswith(blob.read()) for blob in blobs)

    async def test_later_change_does_not_reach_what_was_read(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(BODY)
        ref = await get(make_fetcher(), path.as_uri())
        path.write_bytes(b"x" * len(BODY))
        assert (await ref.open()).read() == BODY

    async def test_outside_paths_look_the_same_whether_they_exist_or_not(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        allowed = tmp_path / "allowed"
        allowed.mkdir()
        (tmp_path / "secret").write_bytes(BODY)
        (allowed / "link").symlink_to(tmp_path / "secret")
        (allowed / "dangling").symlink_to(tmp_path / "nothing")
        (tmp_path / "allowed2").mkdir()
        (tmp_path / "allowed2" / "a").write_bytes(BODY)
        fetcher = make_fetcher(allowed_local_media_path=allowed)
        base = allowed.as_uri()
        messages = set()
        for url in (
            f"{base}/../secret",
            f"{base}/../nothing",
            f"{base}/%2e%2e/secret",
            f"{base}/link",
            f"{base}/dangling",
            f"{base}2/a",
            base,
            "file:///etc/passwd",
            "file:///etc/nothing-here",
            "file://localhost/etc/passwd",
            "file:",
        ):
            with pytest.raises(ForbiddenMediaError, match="allowed-local-media-path") as caught:
                await get(fetcher, url)
            messages.add(str(caught.value))
        assert len(messages) == 1

    async def test_directory_swapped_for_a_link_after_the_check_is_not_read(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        allowed, outside = tmp_path / "allowed", tmp_path / "outside"
        (allowed / "dir").mkdir(parents=True)
        outside.mkdir()
        (allowed / "dir" / "a").write_bytes(b"fine")
        (outside / "a").write_bytes(b"secret")
        fetcher = make_fetcher(allowed_local_media_path=allowed)
        claim = fetcher.budget.claim()
        located = await fetcher._files.locate((allowed / "dir" / "a").as_uri(), claim)
        (allowed / "dir").rename(tmp_path / "moved")
        (allowed / "dir").symlink_to(outside)
        with pytest.raises(ForbiddenMediaError):
            await fetcher._files.fetch(located, timeout_s=1, max_bytes=None, load=True, claim=claim)

    async def test_without_the_flag_files_are_forbidden(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        (tmp_path / "a").write_bytes(BODY)
        fetcher = make_fetcher(allowed_local_media_path=None)
        with pytest.raises(ForbiddenMediaError, match="--allowed-local-media-path"):
            await get(fetcher, (tmp_path / "a").as_uri())

    async def test_what_is_not_a_readable_regular_file_is_a_client_error(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        (tmp_path / "dir").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        fetcher = make_fetcher()
        for name in ("dir", "pipe", "missing", "loop", "nul%00byte", "x" * 5000):
            with pytest.raises(MediaError):
                await get(fetcher, f"{tmp_path.as_uri()}/{name}")

    async def test_size_limits_hold(self, tmp_path: Path, make_fetcher: MakeFetcher) -> None:
        path = tmp_path / "a"
        path.write_bytes(BODY)
        with pytest.raises(MediaTooLargeError, match="limit is 10 bytes"):
            await get(make_fetcher(), path.as_uri(), max_bytes=10)
        with pytest.raises(MediaTooLargeError):
            await get(make_fetcher(local_limit_bytes=10), path.as_uri())

    def test_allowed_path_must_be_a_directory(
        self, tmp_path: Path, make_fetcher: MakeFetcher
    ) -> None:
        with pytest.raises(ValueError, match="existing directory"):
            make_fetcher(allowed_local_media_path=tmp_path / "nothing")


class TestData:
    @pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 300_000])
    async def test_delivers_the_bytes(self, make_fetcher: MakeFetcher, size: int) -> None:
        data = os.urandom(size)
        ref = await get(make_fetcher(), _data_url(data))
        assert (ref.digest, ref.size) == (digest_of(data), size)
        assert (await ref.open()).read() == data

    @pytest.mark.parametrize("size", [100, 300_000])
    async def test_follow_up_finds_the_digest_without_decoding(
        self, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        url = _data_url(BODY[:size])
        fetcher = make_fetcher()
        first = await get(fetcher, url)

        def no_decode(*_: object, **__: object) -> bytes:
            raise AssertionError("the data was decoded")

        monkeypatch.setattr("pybase64.b64decode", no_decode)
        assert (await get(fetcher, "".join(url))).digest == first.digest

    async def test_decoding_ends_when_nobody_waits_for_it(
        self, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
        decode, close = pybase64.b64decode, BlobWriter.close
        chunks = 0

        def slow(text: str, **options: bool) -> bytes:
            nonlocal chunks
            chunks += 1
            begun.set()
            go_on.wait()
            return decode(text, **options)

        def seen(writer: BlobWriter) -> None:
            close(writer)
            ended.set()

        monkeypatch.setattr("pybase64.b64decode", slow)
        monkeypatch.setattr(BlobWriter, "close", seen)
        fetcher = make_fetcher()
        task = asyncio.create_task(get(fetcher, _data_url(bytes(8 << 20))))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        while fetcher.budget.used:
            await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.to_thread(ended.wait)
        assert chunks == 1

    async def test_evicted_data_is_decoded_again(self, make_fetcher: MakeFetcher) -> None:
        fetcher = make_fetcher(cache_bytes=0)
        await get(fetcher, _data_url(BODY))
        ref = await get(fetcher, _data_url(BODY))
        assert (await ref.open()).read() == BODY

    @pytest.mark.parametrize(
        "head",
        [
            "data:;base64,",
            "DATA:video/webm;codecs=vp8,opus;base64,",
            'data:video/mp4;codecs="avc1.42E01E, mp4a.40.2";BASE64,',
            'data:video/mp4;name=";base64,";charset=utf-8; Base64 ,',
        ],
    )
    async def test_parameters_may_hold_commas_and_words_have_any_case(
        self, make_fetcher: MakeFetcher, head: str
    ) -> None:
        ref = await get(make_fetcher(), head + base64.b64encode(BODY).decode())
        assert ref.digest == digest_of(BODY)

    @pytest.mark.parametrize(
        ("url", "is_one"),
        [
            ("data:video/jpeg;base64,AAAA,AAAA", True),
            ("DATA:Video/JPEG;fps=2;base64,AAAA", True),
            ("data:video/jpeg2000;base64,AAAA", False),
            ("data:video/mp4;name=video/jpeg;base64,AAAA", False),
            ("data:video/jpeg,AAAA", False),
            ("https://host/data:video/jpeg;base64,AAAA", False),
        ],
    )
    def test_a_jpeg_sequence_is_known_by_its_media_type(self, url: str, is_one: bool) -> None:
        assert is_jpeg_sequence(url) is is_one

    @pytest.mark.parametrize("size", [1, 2, 3, 1000, 2 << 20])
    @pytest.mark.parametrize(
        "written",
        [
            lambda data: base64.encodebytes(data).decode(),
            lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n\t "),
            lambda data: base64.b64encode(data).decode().rstrip("="),
            lambda data: quote(base64.b64encode(data).decode(), safe=""),
        ],
        ids=["lines", "white space", "no padding", "escapes"],
    )
    async def test_base64_is_read_as_browsers_read_it(
        self, make_fetcher: MakeFetcher, written: Callable[[bytes], str], size: int
    ) -> None:
        data = os.urandom(size)
        url = "data:video/mp4;base64," + written(data)
        ref = await get(make_fetcher(), url, max_bytes=size)
        assert (ref.digest, ref.size) == (digest_of(data), size)
        with pytest.raises(MediaTooLargeError):
            await get(make_fetcher(), url, max_bytes=size - 1)

    async def test_size_limit_is_exact(self, make_fetcher: MakeFetcher) -> None:
        fetcher = make_fetcher()
        for size in (10, 11, 12):
            await get(fetcher, _data_url(bytes(size)), max_bytes=size)
            with pytest.raises(MediaTooLargeError):
                await get(fetcher, _data_url(bytes(size)), max_bytes=size - 1)

    @pytest.mark.parametrize(
        "url",
        [
            "data:video/mp4;base64",
            "data:video/mp4,AAAA",
            "data:,AAAA",
            "data:video/mp4;base64,AAAAA",
            "data:video/mp4;base64,AA=",
            "data:video/mp4;base64,AA==AAAA",
            "data:video/mp4;base64,AA%",
            "data:video/mp4;base64,!!!!",
            "data:video/mp4;base64x,AAAA",
            "data:video/mp4;codecs=base64,AAAA",
            "data:video/mp4;base64,ÄÄÄÄ",
            "data:video/mp4;base64," + "A" * 100_001,
            "data:video/mp4;base64,=",
        ],
    )
    async def test_malformed_data_is_a_client_error(
        self, make_fetcher: MakeFetcher, url: str
    ) -> None:
        with pytest.raises(MediaError) as caught:
            await get(make_fetcher(), url)
        assert "AAAA" not in str(caught.value)


def _data_url(data: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"


def _count_memfds() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += "memfd:mm_ext_media" in os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return count


@contextmanager
def without_descriptors() -> Iterator[None]:
    """No file or connection can be opened meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_a_server_without_descriptors_is_busy_and_the_file_is_not_at_fault(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a"
    path.write_bytes(BODY)
    source = FileSource(tmp_path, threads=readers(), lookups=readers(), max_bytes=None)
    with without_descriptors():
        with pytest.raises(BusyError):
            BlobWriter()
        with pytest.raises(BusyError):
            source._open(path)


async def test_without_descriptors_for_a_connection_the_server_is_busy_and_no_origin_at_fault(
    origin: Origin, make_fetcher: MakeFetcher
) -> None:
    fetcher, url = make_fetcher(), origin.serve("/a", Resource(BODY))
    with without_descriptors(), pytest.raises(BusyError):
        await get(fetcher, url)


@pytest.mark.usefixtures("settled")
async def test_bytes_that_a_request_uses_serve_others_though_no_cache_holds_them(
    make_fetcher: MakeFetcher, tmp_path: Path
) -> None:
    fetcher, path = make_fetcher(cache_bytes=0), tmp_path / "long.mp4"
    path.write_bytes(BODY)
    whole = await get(fetcher, path.as_uri())
    with whole.in_use():
        held = await whole.open()
        for _ in range(3):
            part = await get(fetcher, path.as_uri())
            assert await part.open() is held
        assert fetcher.stats()["file_reads"] == 1
        del held, part
    assert (await (await get(fetcher, path.as_uri())).open()).read() == BODY
    assert fetcher.stats()["file_reads"] == 2


@pytest.mark.usefixtures("settled")
async def test_files_that_are_read_slowly_are_waited_for_and_hold_up_none_that_is_known(
    tmp_path: Path, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = make_fetcher(budget=MediaBudget(1 << 30, max_wait_s=0.3))
    known, slow = tmp_path / "known", [tmp_path / f"{number}" for number in range(17)]
    known.write_bytes(BODY)
    assert (await get(fetcher, known.as_uri())).digest == DIGEST
    chunk = 1 << 20
    for number, path in enumerate(slow):
        path.write_bytes(bytes([number]) * 12 * chunk)
    begun, go_on, really = threading.Semaphore(0), threading.Event(), os.read

    def read(fd: int, size: int) -> bytes:
        if size == chunk:
            begun.release()
            go_on.wait()
            time.sleep(0.1)
        return really(fd, size)

    monkeypatch.setattr(os, "read", read)
    try:
        reading = [asyncio.create_task(get(fetcher, path.as_uri())) for path in slow]
        for _ in range(16):
            await asyncio.to_thread(begun.acquire)
        found = await asyncio.wait_for(get(fetcher, known.as_uri()), 10)
        assert found.digest == DIGEST
    finally:
        go_on.set()
    assert len({ref.digest for ref in await asyncio.gather(*reading)}) == 17


@pytest.mark.parametrize("call", ["lstat", "open"])
async def test_files_of_a_server_that_is_gone_hold_up_no_media_from_elsewhere(
    tmp_path: Path, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    begun, answer = threading.Semaphore(0), threading.Event()
    really = getattr(os, call)

    def hang(path: object, *rest: object, **more: object) -> object:
        if str(path).endswith(".gone"):
            begun.release()
            answer.wait()
        return really(path, *rest, **more)

    fetcher = make_fetcher(budget=MediaBudget(1 << 30, max_wait_s=0.2))
    paths = [tmp_path / f"{number}.gone" for number in range(16)]
    for path in (*paths, tmp_path / "here"):
        path.write_bytes(BODY)
    monkeypatch.setattr(os, call, hang)
    try:
        hanging = [asyncio.create_task(get(fetcher, path.as_uri())) for path in paths]
        for _ in paths:
            await asyncio.to_thread(begun.acquire)
        url = f"data:video/mp4;base64,{base64.b64encode(BODY).decode()}"
        assert (await asyncio.wait_for(get(fetcher, url), 10)).digest == DIGEST
        with pytest.raises(BusyError, match="too many other requests"):
            await asyncio.wait_for(get(fetcher, (tmp_path / "here").as_uri()), 10)
        answer.set()
        assert {ref.digest for ref in await asyncio.gather(*hanging)} == {DIGEST}
        assert (await get(fetcher, (tmp_path / "here").as_uri())).digest == DIGEST
    finally:
        answer.set()
