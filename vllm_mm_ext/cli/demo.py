"""``vllm-mm demo``: serve a model with the plugin and talk to it about a real clip with sound."""

from __future__ import annotations

import base64
import json
import re
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

QUESTIONS = (
    "What happens in this clip?",
    "What do you hear?",
    "When does the scene change?",
    "Describe the last second.",
)
AUDIO_QUESTION = "And what is in this recording?"
MAX_TOKENS = 24


@dataclass
class Turn:
    """One question, its answer, and what the response headers and usage said about it."""

    question: str
    answer: str = ""
    ttft_s: float = 0.0
    applied: dict[str, Any] = field(default_factory=dict)
    stages_ms: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0


def ask(client: Any, model: str, messages: list[dict[str, Any]], question: str) -> Turn:
    """Stream one answer and collect its measurements.

    Args:
        client: ``openai.OpenAI``.
        model: Served model name.
        messages: Conversation so far, the question's message included.
        question: For the report.
    """
    turn = Turn(question)
    started = time.perf_counter()
    response = client.chat.completions.with_raw_response.create(
        model=model,
        messages=messages,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    turn.applied = json.loads(response.headers.get("x-mm-ext", "{}"))
    turn.stages_ms = {
        name: float(duration)
        for name, duration in re.findall(
            r"mm_(\w+);dur=([\d.]+)", response.headers.get("server-timing", "")
        )
    }
    for chunk in response.parse():
        if chunk.choices and chunk.choices[0].delta.content:
            turn.ttft_s = turn.ttft_s or time.perf_counter() - started
            turn.answer += chunk.choices[0].delta.content
        if chunk.usage:
            turn.prompt_tokens = chunk.usage.prompt_tokens
            details = chunk.usage.prompt_tokens_details
            turn.cached_tokens = (details.cached_tokens or 0) if details else 0
    # A model may answer with tokens that decode to nothing; the whole answer is then the first.
    turn.ttft_s = turn.ttft_s or time.perf_counter() - started
    return turn


def report(turns: list[Turn]) -> Table:
    """The table a reader of the demo wants: one row per turn."""
    # Plain and narrow: it has to fit 80 columns.
    table = Table(
        title="What each turn took (times in ms)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in ("turn", "frames", "from", "visual", "audio", "text", "cached"):
        table.add_column(column, justify="right")
    for column in ("media", "prep", "TTFT"):
        table.add_column(column, justify="right")
    for number, turn in enumerate(turns, 1):
        tokens = turn.applied.get("tokens", {})
        videos = turn.applied.get("videos", [])
        frames = ", ".join(str(video["frames"]) for video in videos)
        remembered = all(video["cached"] for video in videos)
        media_ms = max(turn.stages_ms.get(stage, 0.0) for stage in ("video", "audio"))
        table.add_row(
            str(number),
            frames or "-",
            "cache" if remembered else "new",
            str(tokens.get("video", 0) + tokens.get("image", 0)),
            str(tokens.get("audio", 0)),
            str(tokens.get("text", turn.prompt_tokens)),
            f"{turn.cached_tokens}/{turn.prompt_tokens}",
            f"{media_ms:.1f}",
            f"{turn.stages_ms.get('preprocess', 0.0):.1f}",
            f"{turn.ttft_s * 1e3:.0f}",
        )
    return table


def config_for(model: str | None, configs: Path) -> Path | None:
    """The ``--config`` file shipped for a model; the tiny one without a model."""
    if model is None:
        path = configs / "tiny-cpu.yaml"
        return path if path.exists() else None
    for path in sorted(configs.glob("*.yaml")):
        if f"\nmodel: {model}\n" in path.read_text():
            return path
    return None


def demo(
    model: Annotated[
        str | None, typer.Option(help="Model to serve; without it a tiny one built on the spot.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Video with sound; by default Big Buck Bunny (5 s).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the inspect page.")] = Path("out"),
    configs: Annotated[Path, typer.Option(help="Directory of --config files.")] = Path("configs"),
) -> None:
    """Serve a model with the plugin and talk to it about a real clip with sound."""
    from vllm_mm_ext.cli.inspect import inspect
    from vllm_mm_ext.testing.checkpoints import checkpoint
    from vllm_mm_ext.testing.media import Tone, bunny_path, make_audio
    from vllm_mm_ext.testing.server import serve

    console = Console()
    clip = (clip or bunny_path()).resolve()
    if not clip.is_file():
        raise typer.BadParameter(f"no such file: {clip}", param_hint="--clip")
    with ExitStack() as stack:
        console.print(f"[bold]1.[/] Starting vLLM with the plugin, clip: {clip.name}")
        served = model or str(checkpoint("qwen2_5_omni"))
        config = config_for(model, configs)
        args = ["--allowed-local-media-path", str(clip.parent), "--enable-prompt-tokens-details"]
        if config is not None:
            args += ["--config", str(config)]
        env = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"} if model else {}
        server = stack.enter_context(
            serve(served, plugin=True, args=args, env=env, timeout_s=1800 if model else 300)
        )
        console.print(f"   healthy after {server.startup_s:.0f} s at {server.url}")

        console.print("[bold]2.[/] Four turns about the clip, one with separate audio")
        if model is None:
            console.print(
                "   [dim]The tiny model has random weights: its answers are gibberish, "
                "everything around them is real.[/]"
            )
        client = server.client()
        messages: list[dict[str, Any]] = []
        turns: list[Turn] = []
        for number, question in enumerate(QUESTIONS):
            video = {"type": "video_url", "video_url": {"url": clip.as_uri()}}
            text = {"type": "text", "text": question}
            content = [video, text] if number == 0 else question
            _turn(console, client, server.model, messages, content, question, turns)

        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_audio(
            scratch / "tones.wav",
            duration=2.0,
            tones=[Tone(440.0, 0.2, 0.8), Tone(880.0, 1.2, 1.8)],
        )
        sound = {
            "data": base64.b64encode((scratch / "tones.wav").read_bytes()).decode(),
            "format": "wav",
        }
        content = [
            {"type": "input_audio", "input_audio": sound},
            {"type": "text", "text": AUDIO_QUESTION},
        ]
        _turn(console, client, server.model, messages, content, AUDIO_QUESTION, turns)
        console.print(report(turns))

        console.print("[bold]3.[/] What the model saw and heard")
        out.mkdir(parents=True, exist_ok=True)
        page = out / f"{clip.stem}.html"
        inspect(clip, page)
    console.print("[bold]4.[/] Server stopped.")


def _turn(
    console: Console,
    client: Any,
    model: str,
    messages: list[dict[str, Any]],
    content: Any,
    question: str,
    turns: list[Turn],
) -> None:
    messages.append({"role": "user", "content": content})
    turn = ask(client, model, messages, question)
    messages.append({"role": "assistant", "content": turn.answer})
    turns.append(turn)
    console.print(f"   [cyan]user[/] {question}")
    console.print(f"   [green]model[/] {turn.answer!r}")
