"""From a folder of meshes (Y up, front +Z) to a fine-tuned model: python examples/train_on_your_meshes.py MESHES

Stopped, it goes on when it is called again. `docs/train.md` says what the options mean and how many meshes it takes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

LISTS = (
    "latents.output=data/prepared/latents-mine",
    "data.train=data/prepared/mine/train.txt",
    "data.val=data/prepared/mine/val.txt",
)


def main(meshes: str, more: Mapping[str, Sequence[str]] | None = None) -> None:
    """The model is `runs/mine/export`. `more` are further options by step: prepare, cache, dit, export."""
    steps = {
        "prepare": ["prepare-data", "source=folder", f"path={meshes}", "name=mine"],
        "cache": [
            "train",
            "stage=cache",
            "latents.mirror=true",  # twice the shapes, where left and right mean the same
            "latents.augment=true",  # views as people give them
            "init_from=shape-small",
            *LISTS,
        ],
        "dit": [
            "train",
            "stage=dit",
            "name=mine",
            "steps=2000",
            "learning_rate=5e-4",
            "init_from=shape-small",
            *LISTS,
        ],
        "export": ["train", "stage=export", "name=mine"],
    }
    for name, arguments in steps.items():
        command = [sys.executable, "-m", "elastic3d.cli", *arguments, *(more or {}).get(name, [])]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/train_on_your_meshes.py MESHES")
    main(sys.argv[1])
