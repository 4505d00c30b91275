"""``vllm-mm fleet``: an encoder, engines and a router on this machine, from the shipped model."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vllm_mm_ext.tools.cli.common import server_errors

if TYPE_CHECKING:
    from vllm_mm_ext.testing.server import Server

_QUESTION = "What happens in this clip?"
# Encoders take a prompt in one step, so steps are as long as the context.
_CONTEXT = "8192"


def fleet(
    engines: Annotated[int, typer.Option(min=1, max=16, help="Instances that answer.")] = 2,
    once: Annotated[
        bool, typer.Option("--once", help="Ask one question about a clip, twice, and end.")
    ] = False,
) -> None:
    """Run a small fleet on this machine: an encoder, engines that share its outputs, a router."""
    import yaml  # type: ignore[import-untyped]

    from vllm_mm_ext.testing.apart_servers import apart
    from vllm_mm_ext.testing.routers import missing, router
    from vllm_mm_ext.tools.cli.demo import config_for, shipped_model
    from vllm_mm_ext.tools.cli.demo_quiz import usual_clip

    console = Console()
    model, config = shipped_model(), config_for(None, Path())
    if model is None or config is None:
        raise typer.BadParameter("the package has no trained composer")
    settings = yaml.safe_load(config.read_text())["additional-config"]["mm_ext"]
    with server_errors(), ExitStack() as stack:
        clip = usual_clip(Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        args = [
            *("--config", str(config), "--allowed-local-media-path", str(clip.parent)),
            *("--max-model-len", _CONTEXT, "--max-num-batched-tokens", _CONTEXT),
        ]
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-mm-fleet-")))
        console.print(f"Starting one encoder and {engines} engines")
        found = stack.enter_context(
            apart(
                model,
                store,
                engines=engines,
                args=args,
                # By default each would bind its threads to the same cores.
                env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
                settings=settings,
            )
        )
        for name, server in (("encoder", found.encoders[0]), *_named(found.engines)):
            console.print(f"  {name} at {server.url}, healthy after {server.startup_s:.0f} s")
        front = found.engines[0]
        if (reason := missing("envoy")) is None:
            front = stack.enter_context(router("envoy", [one.url for one in found.engines]))
            console.print(f"  Envoy at {front.url}")
        else:
            console.print(f"  {reason}: no router")
        for _ in range(2):
            said = _ask(front, clip)
            console.print(f"  {said['seconds']:.1f} s, {said['cached']} of {said['prompt']} cached")
        _report(console, found.engines)
        if not once:
            console.print(f"Ask {front.url}/v1/chat/completions; Ctrl-C ends the fleet.")
            try:
                while all(one.alive() for one in (*found.encoders, *found.engines)):
                    time.sleep(1.0)
                console.print("A server has ended.")
            except KeyboardInterrupt:
                pass


def _named(engines: list[Server]) -> list[tuple[str, Server]]:
    return [(f"engine {number + 1}", engine) for number, engine in enumerate(engines)]


def _ask(server: Server, clip: Path) -> dict[str, Any]:
    """Ask about a clip as a client would that has a router send its requests."""
    from vllm_mm_ext.fleet.key_headers import route_headers

    video = {"type": "video_url", "video_url": {"url": clip.as_uri()}}
    content = [video, {"type": "text", "text": _QUESTION}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    began = time.monotonic()
    answer = server.client().chat.completions.create(
        model=server.model, max_tokens=16, extra_headers=route_headers(body), **body
    )
    usage: Any = answer.usage
    return {
        "seconds": time.monotonic() - began,
        "prompt": usage.prompt_tokens,
        "cached": usage.prompt_tokens_details.cached_tokens or 0,
    }


def _report(console: Console, engines: list[Server]) -> None:
    """Say where the clip was encoded."""
    for name, engine in _named(engines):
        found = {
            outcome: engine.metric("mm_ext_encoder_transfer_items_total", outcome=outcome)
            for outcome in ("loaded", "missed")
        }
        console.print(
            f"  {name}: {found['loaded']:.0f} segments came from the encoder, "
            f"{found['missed']:.0f} were encoded by itself"
        )
