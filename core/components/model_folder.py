"""From what a user wrote as `model` to a complete local folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from core.components.download_bar import download_bar
from core.messages import ConfigError
from core.resources import shipped

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def display_name(model: str) -> str:
    """The name under which a model is served when none is given: the hub id, or the folder's name."""
    if not model:
        return "demo"
    return model if not _looks_local(model) else Path(model).expanduser().resolve().name


def check_model(model: str, *, weights: bool = True) -> None:
    """Look at a local model without loading it. Raises `ConfigError` for a missing or incomplete folder.

    Hub ids pass; they are only resolved by `resolve_model`. `weights`: whether the engine reads any.
    """
    if not model or _looks_local(model):
        check_folder(_local_folder(model), weights=weights)
    elif not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"Model '{model}' is neither a folder here nor a hub id such as 'Qwen/Qwen3-0.6B'; check the spelling."
        )


def resolve_model(model: str, *, weights: bool = True, report: Callable[[str], None]) -> Path:
    """The folder of a model, downloaded from the hub if it is a hub id; empty is the demo model. Blocks.

    Raises `ConfigError` when there is no such model, or it cannot be fetched, in one sentence.
    """
    if not model or _looks_local(model):
        folder = _local_folder(model)
    else:
        report(f"looking for {model}")
        folder = _download(model, weights, report)
    check_folder(folder, weights=weights)
    return folder


def check_folder(folder: Path, *, weights: bool) -> None:
    """Raises `ConfigError` when a model folder lacks something or a file in it was not written to its end."""
    if not folder.is_dir():
        raise ConfigError(f"Model folder {folder} does not exist; give a folder with config.json, or a hub id.")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ConfigError(f"Model folder {folder} has no tokenizer ({', '.join(_TOKENIZERS)}); {_REFETCH}")
    if not weights:
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"Model folder {folder} has no config.json, so it holds no model; {_REFETCH}")
    files = _weight_files(folder)
    if not files:
        raise ConfigError(f"Model folder {folder} has no *.safetensors files; {_REFETCH}")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"Model folder {folder} is incomplete: {len(missing)} of {len(files)} weight files are missing, "
            f"first {missing[0]}; {_REFETCH}"
        )
    for name in files:
        _check_length(folder / name)


_REFETCH = "fetch the model again."


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} cannot be read ({type(error).__name__}); {_REFETCH}") from error
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _check_length(path: Path) -> None:
    """A safetensors file begins with the length of its header, which says where the last tensor ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ConfigError(f"Weight file {path} is cut off after {size} bytes; {_REFETCH}")
        try:
            header = json.loads(file.read(header_size))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"Weight file {path} has no readable header; {_REFETCH}") from error
    expected = 8 + header_size + max(ends, default=0)
    if size < expected:
        raise ConfigError(f"Weight file {path} is cut off: {size} of {expected} bytes; {_REFETCH}")


def _looks_local(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..") or Path(model).is_dir()


def _local_folder(model: str) -> Path:
    if model:
        return Path(model).expanduser().resolve()
    try:
        return shipped("models/demo")
    except FileNotFoundError as error:
        raise ConfigError(f"There is no demo model: {error}; give a model with --Worker.model=FOLDER.") from error


def _download(model: str, weights: bool, report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    wanted = _WANTED if weights else [pattern for pattern in _WANTED if "safetensors" not in pattern]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, tqdm_class=download_bar(model, report)))
    except GatedRepoError as error:
        raise ConfigError(
            f"Model '{model}' needs its owner's permission: ask for access on its page, then run 'hf auth login'."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"There is no model '{model}' on the hub (or it is private); check the spelling.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"Model '{model}' could not be fetched from the hub ({type(error).__name__}): is there a network? "
            "A folder on this machine works without one: --Worker.model=FOLDER."
        ) from error
