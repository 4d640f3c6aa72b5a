"""Options of `scripts/time_stages.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic3d.config.base import check_range, option
from elastic3d.config.generate import DEFAULT_MODEL


@dataclass(kw_only=True)
class StagesConfig:
    """How long each stage from an image to a written mesh takes, also against another checkout."""

    image: Path = option(Path("data/samples/chair.png"), "image of one object")
    model: Path = option(Path(DEFAULT_MODEL), "folder of the model; both checkouts load this one")
    against: Path | None = option(
        None, "root of another checkout, measured in turn with this one; null: none"
    )
    output: Path = option(Path("outputs/stages.json"), "JSON file with every measurement")
    rounds: int = option(3, "fresh processes of each checkout")
    repeats: int = option(3, "meshes that such a process makes after its first")
    commands: bool = option(True, "also time the whole commands gen_mesh.py and gen_mesh.py --help")
    resolution: int = option(256, "grid cells a side of the decoding")
    elastic: bool = option(True, "let the routers decide; false: the dense model")
    threads: int = option(0, "threads of PyTorch; 0: its own choice")

    def __post_init__(self) -> None:
        check_range("rounds", self.rounds, 1, 1000)
        check_range("repeats", self.repeats, 1, 1000)
        check_range("resolution", self.resolution, 8, 512)
        check_range("threads", self.threads, 0, 1024)
