"""Checkpoints on disk or on the Hub: which model a folder holds, and those in the layout of diffusers.

That is `model_index.json` and a folder for each part; a family says in its `Layout` what its files mean.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d.checkpoints.bundle import Bundle, Inspection, Loader, on_meta
from elastic3d.checkpoints.dinov2 import load_network, other_network
from elastic3d.checkpoints.options import PRESETS, REPOSITORY, CheckpointConfig
from elastic3d.checkpoints.tensors import Row, count_parameters, has_encoder, read_checkpoint, to_ours
from elastic3d.errors import UserError
from elastic3d.models.image_encoder import DinoV2, dinov2_files
from elastic3d.models.options import VAEConfig
from elastic3d.utils.files import load_json

INDEX_NAME = "model_index.json"
IMAGE_PIPELINES = ("PixelFluxPipeline", "FluxPipeline", "QwenImagePipeline")
PIPELINE_CLASSES = {"TripoSGPipeline": "triposg", "Step1X3DGeometryPipeline": "step1x3d"}
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp16", ".bf16")


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
        """Parameters of a part, as `count_parameters`."""
        return sum(map(count_parameters, self.files(part)))

    def renamed(
        self, part: str, config: Any, rows: Sequence[Row], state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], str]:
        """A part's published tensors under the names of this project's model of a configuration, and their files."""
        source = ", ".join(map(str, self.files(part)))
        shapes = on_meta(config).state_dict()
        return to_ours(state, rows, shapes, source), source


@dataclass(frozen=True)
class Layout:
    """What a family's folder means: its configuration, and the names of its tensors.

    Attributes:
        model: the preset's name.
        encoder: the folder of the image encoder.
        parse: (folder, tensors of the encoder, whether the weights hold the VAE's encoder) -> the configuration.
        dit_rows, vae_rows: our names of a model's tensors, and the published ones.
        encoder_state: (folder) -> tensors of the encoder, where no file describes its network.
        registers: whether its DINOv2 has registers.
    """

    model: str
    encoder: str
    parse: Callable[[Folder, Mapping[str, Tensor], bool], CheckpointConfig]
    dit_rows: Callable[[Any], list[Row]]
    vae_rows: Callable[[VAEConfig], list[Row]]
    encoder_state: Callable[[Folder], dict[str, Tensor]] | None = None
    registers: bool = False

    def load(
        self,
        folder: str | Path,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        dinov2: str | Path | None,
        subfolder: str,
    ) -> Bundle:
        """The checkpoint in a folder, as the family's loader says."""
        source, loader = open_folder(folder, self.model, subfolder), Loader.of(dtype, device)
        own = dinov2 is None and source.has(self.encoder)
        state = self.encoder_state(source) if own and self.encoder_state else {}
        vae_state = source.state("vae")
        config = self.parse(source, state, has_encoder(vae_state))
        vae = loader.build(
            config.vae, *source.renamed("vae", config.vae, self.vae_rows(config.vae), vae_state)
        )
        dit_state, rows = source.state("transformer"), self.dit_rows(config.dit)
        dit = loader.build(config.dit, *source.renamed("transformer", config.dit, rows, dit_state))
        conditioner: DinoV2 | None = None
        files, note = [*source.files("transformer"), *source.files("vae")], ""
        if dinov2 is not None:
            conditioner = other_network(config, Path(dinov2), loader, self.registers)
            files += dinov2_files(Path(dinov2))
        elif own:
            home = source.root / self.encoder
            conditioner = (
                load_network(config, state, str(home), loader)
                if state
                else other_network(config, home, loader, self.registers)
            )
            files += self._encoder_files(source)
        else:
            note = self._no_encoder(source)
            warnings.warn(note, stacklevel=3)
        return Bundle(dit, vae, conditioner, config, tuple(files), note)

    def inspect(self, folder: str | Path, subfolder: str, dinov2: str) -> Inspection:
        """What a checkpoint is made of, without its weights; errors as in the family's loader."""
        source = open_folder(folder, self.model, subfolder)
        config = self.parse(source, {}, True)
        sizes = {"condition": 0, "dit": source.count("transformer"), "decode": source.count("vae")}
        if not dinov2 and not source.has(self.encoder):
            return Inspection(config, sizes, self._no_encoder(source))
        files = dinov2_files(Path(dinov2)) if dinov2 else self._encoder_files(source)
        sizes["condition"] = sum(map(count_parameters, files))
        return Inspection(config, sizes)

    def _encoder_files(self, source: Folder) -> list[Path]:
        return source.files(self.encoder) if self.encoder_state else dinov2_files(source.root / self.encoder)

    def _no_encoder(self, source: Folder) -> str:
        return (
            f"{source.root} holds no image encoder ({self.encoder}): give the folder of a DINOv2 as dinov2="
        )


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
    if not root.exists() and REPOSITORY.fullmatch(str(folder)):
        ignored = ["*.png", "*.jpg", "*.gif", "*.mp4", "*.glb", "*.onnx"]
        root = download(
            str(folder),
            str(folder),
            "give its folder as weights=",
            [f"{subfolder}/*" if subfolder else "*"],
            ignore_patterns=ignored,
            cache_dir=hub_cache(),
        )
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


def identify(folder: Path) -> str:
    """`this is Hunyuan3D-2.1, say model=hunyuan3d2_1`, or nothing where the folder is of no known model."""
    if (kind := _class_name(folder / INDEX_NAME)) in IMAGE_PIPELINES:
        return f"this is a text-to-image model ({kind}), expected one of meshes"
    if (folder / "pipeline.json").is_file():
        return f"this is a model folder of elastic3d, say model={folder}"
    for name, preset in PRESETS.items():
        if preset.subfolder and (folder / preset.subfolder).is_dir():
            return _say(name)
        if preset.subfolder and folder.name == preset.subfolder:
            return _say(name)
    if (folder / INDEX_NAME).is_file():
        return _say_pipeline(_class_name(folder / INDEX_NAME))
    config = folder / "config.yaml"
    if config.is_file():
        text = config.read_text(errors="replace")
        if "HunYuanDiTPlain" in text:
            return _say("hunyuan3d2_1")
        if "Hunyuan3DDiT" in text:
            return _say("hunyuan3d2")
    return ""


def refuse(folder: Path) -> None:
    """UserError for a folder without `pipeline.json` that is not there, or of another kind of model."""
    if not folder.is_dir() and str(folder) in PRESETS:  # a command has taken it for the model's name
        raise UserError(
            f"{folder} is the name of a published model, expected the folder that"
            f" scripts/import_weights.py model={folder} writes of its weights"
        )
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}, expected one with pipeline.json, or one of {', '.join(PRESETS)}"
        )
    if found := identify(folder):
        raise UserError(f"{folder}: {found}" + (f" weights={folder}" if "model=" in found else ""))


def _say(name: str) -> str:
    return f"this is {PRESETS[name].title}, say model={name}"


def _say_pipeline(found: str) -> str:
    if found in PIPELINE_CLASSES:
        return _say(PIPELINE_CLASSES[found])
    return f"this is {found.removesuffix('Pipeline')}, which elastic3d can't load" if found else ""


def _class_name(path: Path) -> str:
    try:
        return str(json.loads(path.read_text()).get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def hub_cache() -> Path:
    """Where the Hub's client keeps what it downloaded."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def download(repository: str, looked: str, hint: str, patterns: list[str], **options: Any) -> Path:
    """The repository's snapshot in the Hub's cache.

    Args:
        looked: the folders where it was not, for the error.
        hint: what to do where it can't be downloaded, likewise.
        patterns: of the files that are needed.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, **options))
    except Exception as error:  # offline, unknown, gated: each an exception of another library
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"there is no folder {looked}, and {repository} can't be downloaded ({reason}): {hint}"
        ) from error
