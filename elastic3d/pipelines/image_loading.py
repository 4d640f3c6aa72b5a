"""Parts of text-to-image pipelines from folders in the layout in which they are published, strictly and offline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from elastic3d.errors import UserError
from elastic3d.utils.files import load_json

INDEX_NAME = "model_index.json"


def check_index(folder: Path, pipeline_class: str) -> None:
    """Raise UserError unless `folder` says that it is a `pipeline_class`."""
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"weights is {folder}, which {kind}: expected the folder of a {pipeline_class}")
    if not (folder / INDEX_NAME).is_file():
        raise UserError(f"{folder} is no pipeline: it has no {INDEX_NAME}")
    found = load_json(folder / INDEX_NAME).get("_class_name")
    if found != pipeline_class:
        raise UserError(f"{folder} is a {found}, expected a {pipeline_class}: choose another backbone=")


def weight_files(folder: Path, pattern: str = "transformer/*.safetensors") -> list[Path]:
    """The files of the DiT, all shards of it."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"{folder / 'transformer'} has no .safetensors file")
    return files


def encoder_files(folder: Path) -> list[Path]:
    """The files of the VAE and of the text encoders; none of the small model, whose folder is a DiT alone."""
    return [path for part in ("vae", "text_*") for path in sorted(folder.glob(f"{part}/*.safetensors"))]


def load_transformer(folder: Path, dtype: torch.dtype) -> Any:
    """The DiT of a pipeline. diffusers only warns of weights that are missing; here that is an error."""
    import diffusers

    config = folder / "transformer" / "config.json"
    name = str(load_json(config).get("_class_name"))
    transformer_class = getattr(diffusers, name, None)
    if transformer_class is None:
        raise UserError(f"{config} describes a {name}, which diffusers does not know")
    weight_files(folder)
    model, found = transformer_class.from_pretrained(
        config.parent,
        torch_dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := found.get(what):
            which = f"{len(keys)} {what.replace('_', ' ')}, first {sorted(map(str, keys))[0]}"
            raise UserError(f"{config.parent} does not fit {name}: {which}")
    return model


def merge_lora(pipe: Any, path: Path) -> Path:
    """Add a LoRA to the weights of a pipeline, with or without routers -> its file.

    Raises:
        UserError: peft is not installed, or the file is missing, broken, or made for another model.
    """
    if find_spec("peft") is None:
        raise UserError("lora= needs peft, which is not installed: pip install 'elastic3d[lora]'")
    if not path.is_file() or path.suffix != ".safetensors":
        raise UserError(f"lora is {path}, expected a .safetensors file")
    try:
        with quiet():
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
    except Exception as error:  # loaders of third-party files raise anything
        raise UserError(f"{path} can't be loaded as a LoRA of this pipeline: {first_line(error)}") from error
    return path


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from the loaders inside the block."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    before = [(module, module.get_verbosity()) for module in (of_diffusers, of_transformers)]
    for module, _ in before:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that diffusers renames between releases
            yield
    finally:
        for module, verbosity in before:
            module.set_verbosity(verbosity)
            module.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What went wrong, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
