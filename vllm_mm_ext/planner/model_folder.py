"""Finds a model's files on this machine and says which of them is missing."""

from __future__ import annotations

from pathlib import Path

# What vLLM and transformers read of a checkpoint before any weights; one file of each group.
_NEEDED: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("configuration of the model", (("config.json",),)),
    (
        "configuration of the media processor",
        (("preprocessor_config.json",), ("processor_config.json",)),
    ),
    ("tokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))),
    ("configuration of the tokenizer", (("tokenizer_config.json",),)),
)
# The composer's processor is configured by config.json alone.
_OWN_PROCESSOR = "mm_ext_composer"


class ModelFilesError(ValueError):
    """Files of a model are missing; the message names them."""


def model_folder(model: str) -> str:
    """The folder of a model's files, or the model's name where it is one on the Hugging Face hub.

    Args:
        model: A folder, a ``config.json`` in one, or a name on the hub.

    Raises:
        ModelFilesError: A path leads nowhere, or files are missing in the folder.
    """
    path = Path(model).expanduser()
    if path.suffix == ".json":
        if not path.is_file():
            raise ModelFilesError(f"{model}: no such file")
        if path.name != "config.json":
            raise ModelFilesError(
                f"{model}: the file must be named config.json and lie in a folder with the other "
                f"files of the model: {_all_names()}"
            )
        path = path.parent
    if not path.is_dir():
        if model.count("/") == 1 and not model.startswith((".", "/", "~")):
            return model
        raise ModelFilesError(
            f"{model}: no such folder. Give a folder with the model's files, the config.json in "
            "it, or a name on the Hugging Face hub such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    missing = [what for what in _missing(path) if what]
    if missing:
        raise ModelFilesError(
            f"{path}: {'; '.join(missing)}. Tokens are counted by the processor that serves the "
            "model, which reads these files; no weights are needed"
        )
    return str(path)


def _missing(folder: Path) -> list[str]:
    found = []
    for what, choices in _NEEDED:
        if any(all((folder / name).is_file() for name in names) for names in choices):
            continue
        if "processor" in what and _is_composer(folder):
            continue
        found.append(f"no {' or '.join(' and '.join(names) for names in choices)} ({what})")
    return found


def _is_composer(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and _OWN_PROCESSOR in config.read_text(encoding="utf-8")


def _all_names() -> str:
    return ", ".join(" and ".join(choices[0]) for _, choices in _NEEDED[1:])
