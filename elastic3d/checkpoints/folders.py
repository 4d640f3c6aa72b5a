"""Checkpoints in the layout of diffusers: `model_index.json` and a folder for each part, on disk or on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elastic3d.checkpoints.bundle import model_class, on_meta
from elastic3d.checkpoints.identify import INDEX_NAME, PIPELINE_CLASSES, identify
from elastic3d.checkpoints.options import PRESETS
from elastic3d.checkpoints.tensors import Row, count_parameters, read_checkpoint, to_ours
from elastic3d.errors import UserError
from elastic3d.utils.structured import load_json

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp16", ".bf16")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Folder:
    """A checkpoint's folder and its `model_index.json`."""

    root: Path
    index: dict[str, Any]

    def has(self, part: str) -> bool:
        """Whether the index names a part, rather than null. UserError if it does, but there is no such folder."""
        named = self.index.get(part)
        if named is None or (isinstance(named, list) and None in named):
            return False
        if not (self.root / part).is_dir():
            raise UserError(
                f"{self.root / INDEX_NAME} names {part}, but there is no folder {self.root / part}"
            )
        return True

    def _require(self, part: str) -> None:
        if not self.has(part):
            raise UserError(f"{self.root / INDEX_NAME} has no {part}, expected one")

    def config(self, part: str, name: str = "config.json") -> tuple[dict[str, Any], str]:
        """A part's configuration and its path; notes of the program that wrote it (`_class_name` ...) are left out."""
        self._require(part)
        path = self.root / part / name
        return {key: value for key, value in load_json(path).items() if not key.startswith("_")}, str(path)

    def check_class(self, part: str, *expected: str, name: str = "config.json") -> None:
        """UserError if a part's configuration names another class; one that names none is taken as it is."""
        path = self.root / part / name
        found = load_json(path).get("_class_name", expected[0])
        if found not in expected:
            raise UserError(f"{path} describes a {found}, expected a {' or '.join(expected)}")

    def files(self, part: str) -> list[Path]:
        """The files of a part's weights; UserError where there are none."""
        self._require(part)
        folder = self.root / part
        names = [f"{stem}{variant}" for stem in _STEMS for variant in _VARIANTS]
        for name in names:
            index = folder / f"{name}.safetensors.index.json"
            if index.is_file():
                shards = load_json(index).get("weight_map")
                if not isinstance(shards, dict) or not shards:
                    raise UserError(f"{index} has no weight_map")
                return [folder / str(shard) for shard in sorted(set(shards.values()))]
            for suffix in (".safetensors", ".bin"):
                if (folder / f"{name}{suffix}").is_file():
                    return [folder / f"{name}{suffix}"]
        raise UserError(f"{folder} has no weights, expected {_STEMS[0]}.safetensors")

    def state(self, part: str) -> dict[str, Tensor]:
        """Every tensor of a part under its published name."""
        state: dict[str, Tensor] = {}
        for path in self.files(part):
            state |= read_checkpoint(path)
        return state

    def count(self, part: str) -> int:
        """Parameters of a part, from the heads of its files; UserError where one is truncated.

        A `.bin` has no such head: it is taken for half precision.
        """
        return sum(
            count_parameters(path) if path.suffix == ".safetensors" else path.stat().st_size // 2
            for path in self.files(part)
        )

    def renamed(
        self, part: str, config: Any, rows: Sequence[Row], state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], str]:
        """A part's published tensors under the names of this project's model of a configuration, and their files."""
        source = ", ".join(map(str, self.files(part)))
        shapes = on_meta(model_class(config), config).state_dict()
        return to_ours(state, rows, shapes, source), source


def open_folder(folder: str | Path, model: str, subfolder: str = "") -> Folder:
    """The checkpoint of a published model.

    Args:
        folder: the folder of `model_index.json`, the one above it, or a repository of the Hugging Face Hub, which is
            looked for in its cache ($HF_HOME) too.
        model: the preset's name.

    Raises:
        UserError: nothing is there, or another model: names it.
    """
    preset = PRESETS[model]
    subfolder = subfolder or preset.subfolder
    root = Path(folder).expanduser()
    if not root.exists() and _REPOSITORY.fullmatch(str(folder)):
        root = _download(str(folder), subfolder)
    if root.is_file():
        raise UserError(f"{root} is a file, expected the folder that holds {INDEX_NAME}")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}, expected one with {INDEX_NAME} of {preset.title}")
    for place in dict.fromkeys((root / subfolder, root)):
        if not (place / INDEX_NAME).is_file():
            continue
        index = load_json(place / INDEX_NAME)
        if PIPELINE_CLASSES.get(str(index.get("_class_name"))) != model:
            found = identify(place) or f"{INDEX_NAME} names no class of {preset.title}"
            raise UserError(f"{place}: {found}")
        return Folder(place, index)
    found = identify(root)
    raise UserError(
        f"{root}: {found}" if found else f"{root} has no {INDEX_NAME}, expected that of {preset.title}"
    )


def hub_cache() -> Path:
    """Where the Hub's client keeps what it downloaded."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def _download(repository: str, subfolder: str) -> Path:
    """The repository's snapshot in the Hub's cache."""
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/*" if subfolder else "*"]
    ignored = ["*.png", "*.jpg", "*.gif", "*.mp4", "*.glb", "*.onnx"]
    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=patterns, ignore_patterns=ignored, cache_dir=hub_cache()
            )
        )
    except Exception as error:  # offline, unknown, gated: each an exception of another library
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"there is no folder {repository}, and the repository can't be downloaded ({reason}): give its folder as"
            " weights="
        ) from error
