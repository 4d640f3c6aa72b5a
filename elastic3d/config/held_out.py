"""Options of `scripts/held_out.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic3d.config.base import DeviceChoice, DTypeChoice, check_range, option
from elastic3d.config.generate import DEFAULT_MODEL
from elastic3d.config.prepare import PrepareConfig


@dataclass(kw_only=True)
class HeldOutConfig:
    """What a model makes of held-out shapes, as folders of meshes that `scripts/evaluate.py` compares."""

    model: str = option(DEFAULT_MODEL, "folder of the model")
    output: Path = option(Path("outputs/held_out"), "folder for the folders of meshes")
    split: Path = option(Path("data/splits/test.txt"), "list of source/id to take held-out shapes from")
    train: Path = option(
        Path("data/splits/train.txt"), "list of source/id the nearest shape is looked for in"
    )
    data: PrepareConfig = option(PrepareConfig, "source of the shapes; its output is where the shards are")
    limit: int = option(64, "held-out shapes, spread evenly over the list; 0 takes all")
    view: int = option(0, "which of the stored views is the input")
    seeds: list[int] = option([0, 1, 2], "seeds of generation; empty: no generation")
    steps: int | None = option(None, "sampling steps; null: the model's default")
    guidance: float | None = option(None, "guidance scale; null: the model's default")
    resolution: int = option(256, "grid cells a side of the decoding")
    surface_points: int = option(2048, "surface points the VAE's encoder reads")
    bank_views: int = option(4, "views of each training shape that retrieval compares with")
    batch_size: int = option(8, "meshes generated at a time")
    device: DeviceChoice = option(DeviceChoice.auto, "where the model runs")
    dtype: DTypeChoice = option(DTypeChoice.auto, "number format of the model")

    def __post_init__(self) -> None:
        check_range("limit", self.limit, 0, 1 << 20)
        check_range("view", self.view, 0, 1000)
        check_range("resolution", self.resolution, 8, 512)
        for name in ("surface_points", "bank_views", "batch_size"):
            check_range(name, getattr(self, name), 1, 1 << 20)
