"""Where Hunyuan3D-2 checkpoints lie: a folder, the cache of the original program, or the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from elastic3d.errors import UserError

CONFIG_NAME = "config.yaml"
WEIGHTS_NAMES = ("model.fp16.safetensors", "model.safetensors", "model.fp16.ckpt", "model.ckpt")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def find_checkpoint(folder: str | Path, subfolder: str) -> tuple[Path, Path]:
    """Config and weights of a checkpoint.

    Args:
        folder: looked for as it is, then below $HY3DGEN_MODELS (or ~/.cache/hy3dgen), then on the Hugging Face Hub.
            It may also be the checkpoint's own folder.

    Raises:
        UserError: nothing is there; names what was looked for and what there is instead.
    """
    home = Path(os.environ.get("HY3DGEN_MODELS", "~/.cache/hy3dgen")).expanduser()
    candidates = [Path(folder).expanduser(), home / folder]
    for root in candidates:
        if (root / subfolder).is_dir():
            return _files(root / subfolder)
    for root in candidates:
        if (root / CONFIG_NAME).is_file():
            if root.name.startswith("hunyuan3d-") and root.name != subfolder:
                raise UserError(
                    f"{root} is not {subfolder}: give the folder above it, or subfolder={root.name}"
                )
            return _files(root)
        if root.is_file():
            raise UserError(f"{root} is a file, expected the folder that holds {subfolder}/{CONFIG_NAME}")
        if root.is_dir():
            there = sorted(path.parent.name for path in root.glob(f"*/{CONFIG_NAME}"))
            hint = f"it has {', '.join(there)}" if there else f"and no other with a {CONFIG_NAME}"
            raise UserError(f"{root} has no folder {subfolder}, {hint}")
    looked = " nor ".join(dict.fromkeys(str(path) for path in candidates))
    if _REPOSITORY.fullmatch(str(folder)):
        return _files(_download(str(folder), subfolder, looked) / subfolder)
    raise UserError(f"there is no folder {looked}")


def _files(folder: Path) -> tuple[Path, Path]:
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise UserError(f"there is no file {config}")
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return config, folder / name
    raise UserError(f"{folder} has no weights, expected one of {', '.join(WEIGHTS_NAMES)}")


def _download(repository: str, subfolder: str, looked: str) -> Path:
    """The repository's snapshot in the Hub's own cache; `looked` are the folders where it was not."""
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{name}" for name in (CONFIG_NAME, WEIGHTS_NAMES[0], "*.ckpt")]
    try:
        root = Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated: each an exception of another library
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"there is no folder {looked}, and {repository} can't be downloaded ({reason}): put {subfolder}/ "
            f"with {CONFIG_NAME} and {WEIGHTS_NAMES[0]} into a folder and give that as weights="
        ) from error
    if not (root / subfolder).is_dir():
        raise UserError(f"{repository} has no folder {subfolder}")
    return root
