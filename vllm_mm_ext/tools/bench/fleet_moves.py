"""``fleet``, part `moves`: how many keys move when a replica comes or goes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import aiohttp
from aiohttp import web

from vllm_mm_ext.fleet.rendezvous import ranked
from vllm_mm_ext.fleet.route_key import KEY_HEADER, named_key
from vllm_mm_ext.testing.routers import router
from vllm_mm_ext.testing.server import free_port
from vllm_mm_ext.tools.bench.fleet_study import FleetStudy
from vllm_mm_ext.tools.bench.harness import Row

REPLICAS = 4
KEYS = 4000


def moves(study: FleetStudy) -> list[Row]:
    """Share of the keys that go elsewhere with one replica more, times the replicas: 1 is least."""
    ports = [free_port() for _ in range(REPLICAS + 1)]
    keys = [named_key(str(number)) for number in range(KEYS)]
    ways: dict[str, Callable[[Sequence[int]], Mapping[str, str]]] = {
        "rendezvous": lambda some: {
            key: ranked(key, [_url(port) for port in some])[0] for key in keys
        }
    }
    if study.has_envoy:
        ways["Envoy's MAGLEV"] = lambda some: asyncio.run(_through_envoy(some, keys))
    rows = []
    for name, place in ways.items():
        few, many = place(ports[:-1]), place(ports)
        moved = sum(few[key] != many[key] for key in keys) / KEYS
        needless = sum(few[key] != many[key] != _url(ports[-1]) for key in keys) / KEYS
        values = {
            f"keys that move between {REPLICAS} and {REPLICAS + 1} replicas, share x "
            f"{REPLICAS + 1}": moved * (REPLICAS + 1),
            "keys that move between replicas that stay": needless,
        }
        rows += [Row.of(f"moves: {name}, {what}", "", plugin=[v]) for what, v in values.items()]
    return rows


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


async def _through_envoy(ports: Sequence[int], keys: Sequence[str]) -> dict[str, str]:
    """Where Envoy sends each key. The replicas only tell who they are."""
    runners = []

    async def start(port: int) -> None:
        async def tell(_: web.Request) -> web.Response:
            return web.Response(text=_url(port))

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", tell)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        runners.append(runner)

    for port in ports:
        await start(port)
    try:
        manager = router("envoy", [_url(port) for port in ports])
        # Envoy asks the replicas for their health, which this loop answers.
        envoy = await asyncio.to_thread(manager.__enter__)
        try:
            return await _asked(envoy.url, ports, keys)
        finally:
            await asyncio.to_thread(manager.__exit__, None, None, None)
    finally:
        for runner in runners:
            await runner.cleanup()


async def _asked(url: str, ports: Sequence[int], keys: Sequence[str]) -> dict[str, str]:
    async with aiohttp.ClientSession() as session:

        async def ask(key: str) -> str:
            headers = {} if not key else {KEY_HEADER: key}
            async with session.get(f"{url}/v1/models", headers=headers) as response:
                return await response.text()

        # Until Envoy knows of all that they are healthy.
        while len({await ask("") for _ in range(100)}) < len(ports):
            await asyncio.sleep(0.1)
        # One at a time: at the bound on requests in flight, a key goes elsewhere.
        return {key: await ask(key) for key in keys}
