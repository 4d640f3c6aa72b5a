"""Training data: prepared shapes by id, and a loader whose position is the step alone."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elastic3d.errors import UserError
from elastic3d.evaluation.items import spread
from elastic3d.models.weights import open_tensors, tensor_heads
from elastic3d.preparation.sources import read_list
from elastic3d.training.options import DataConfig, LoopConfig, SplitsConfig

Batch = dict[str, Tensor]
_PACKAGE = Path(__file__).resolve().parents[1]


class Items(Protocol):
    """Random access to training items; every random choice in item `position` comes from (seed, position)."""

    def item(self, position: int, seed: int) -> Batch:
        """Sample number `position` of an endless shuffled stream."""
        ...


def read_split(paths: Sequence[Path]) -> list[str]:
    """Ids `source/id` of split files, in order, each once; blank lines and # comments do not count."""
    ids: dict[str, None] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"there is no split file {path}: name lists that are there with data.train= and data.val=, or let"
                " scripts/prepare_data.py source=folder write them"
            )
        ids.update(dict.fromkeys(read_list(path)))
    if not ids:
        names = ", ".join(map(str, paths)) or "the list of split files"
        raise UserError(
            f"{names} names no shape, expected lines such as folder/chair (source/id): scripts/prepare_data.py"
            " source=folder writes them"
        )
    return list(ids)


def own_lists(prepared: Path) -> list[Path]:
    """The training lists that `source=folder` left beside a user's prepared meshes."""
    found = sorted(prepared.glob("*/train.txt"))
    return [path for path in found if any(path.parent.glob("shard-*.safetensors"))]


def use_own_lists(config: SplitsConfig) -> None:
    """Train on a user's own meshes where they are all that is prepared and no lists were named.

    UserError if a list that was named is missing.
    """
    default = SplitsConfig()
    if not (_are_shipped(config.train, default.train) and _are_shipped(config.val, default.val)):
        return
    sources = {id.partition("/")[0] for id in read_split([*config.train, *config.val])}
    if any(any((config.prepared / source).glob("shard-*.safetensors")) for source in sources):
        return
    if own := own_lists(config.prepared):
        config.train, config.val = own, [path.with_name("val.txt") for path in own]


def _are_shipped(lists: Sequence[Path], shipped: Sequence[Path]) -> bool:
    """Whether these are lists of the repository, which scripts name by absolute paths from other folders."""
    homes = (Path(), _PACKAGE, _PACKAGE.parent)  # a checkout; an installed package; a checkout from elsewhere
    return any(list(lists) == [home / path for path in shipped] for home in homes)


def list_options(folder: Path) -> str:
    """The options that name the lists in a folder, as a shell takes them."""
    return shlex.join(f"data.{name}={folder / f'{name}.txt'}" for name in ("train", "val"))


def nothing_prepared(count: int, root: Path) -> str:
    """Why there is nothing to train on under a folder, and what to do about it."""
    if own := own_lists(root):
        lists = list_options(own[0].parent)
        advice = f"your own meshes are used with {lists}"
    elif (root / "latents.json").is_file():
        advice = "stage=cache with the same data.train= and data.val= puts them there"
    else:
        advice = "scripts/prepare_data.py makes them"
    return f"none of the {count} shapes that the lists name is under {root}: {advice}"


class PreparedShapes:
    """The shapes of a split that are there, over all sources: tensors of safetensors shards, which are mapped and not
    read. A shard that appears later is not seen: what a run trains on does not change under it.

    Attributes:
        ids: those found, `source/id`, in the split's order.
        missing: how many of the split were not found.
    """

    def __init__(self, root: Path, split: Sequence[str], preload: Sequence[str] = (), limit: int = 0) -> None:
        self._root = root
        self._shards: dict[str, Path] = {}
        self._names: dict[str, list[str]] = {}
        self._open: dict[Path, Any] = {}
        for source in dict.fromkeys(id.partition("/")[0] for id in split):
            for path in sorted((root / source).glob("shard-*.safetensors")):
                for key in tensor_heads(path):
                    own, _, name = key.rpartition("/")
                    self._shards[f"{source}/{own}"] = path
                    self._names.setdefault(f"{source}/{own}", []).append(name)
        found = [id for id in split if id in self._shards]
        self.missing = len(split) - len(found)
        # A split lists category after category: a part of it is taken from everywhere.
        self.ids: list[str] = spread(found, limit)
        if not self.ids:
            raise UserError(nothing_prepared(len(split), root))
        self._loaded: dict[tuple[str, str], Tensor] = {}
        self._loaded = {(id, name): self.read(id, name) for id in self.ids for name in preload}

    def __len__(self) -> int:
        return len(self.ids)

    def require(self, ids: Sequence[str]) -> None:
        """UserError that names the first of these shapes, of the split, that is not there."""
        if absent := [id for id in ids if id not in self._shards]:
            raise UserError(
                f"{absent[0]} is in the cache of latents, but not under {self._root}: prepare it again with"
                " scripts/prepare_data.py, or leave it out of the lists"
            )

    def has(self, id: str, name: str) -> bool:
        """Whether a tensor of this name is stored of a shape."""
        return name in self._names[id]

    def read(self, id: str, name: str, row: int | None = None) -> Tensor:
        """A stored tensor of a shape, or one row of it; the caller must not change it."""
        if (id, name) in self._loaded:
            whole = self._loaded[id, name]
            return whole if row is None else whole[row]
        path, key = self._shards[id], f"{id.partition('/')[2]}/{name}"
        if not self.has(id, name):
            raise UserError(f"{path} has no tensor {key}, but {', '.join(self._names[id])} of this shape")
        if path not in self._open:
            self._open[path] = open_tensors(path)
        return self._open[path].get_tensor(key) if row is None else self._open[path].get_slice(key)[row]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # another process maps the files itself


def record_of_shapes(train: PreparedShapes, val: PreparedShapes) -> dict[str, int]:
    """How many shapes a run trains and is validated on, and how many of the training split were not there."""
    return {"train_shapes": len(train), "train_missing": train.missing, "val_shapes": len(val)}


def open_split(
    config: DataConfig, split: Sequence[Path], names: Sequence[str], limit: int = 0
) -> PreparedShapes:
    """The shapes of split files, at most `limit`; tensors `names` are read at once if `preload` is set."""
    return PreparedShapes(config.prepared, read_split(split), names if config.preload else (), limit)


class Shuffle:
    """An endless stream over `count` things, each once an epoch in an order drawn from (seed, epoch)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._epoch: tuple[int, int] | None = None
        self._order = np.empty(0, dtype=np.int64)

    def __call__(self, position: int, seed: int) -> int:
        """What comes at `position`."""
        epoch, place = divmod(position, self.count)
        if self._epoch != (seed, epoch):
            self._order = np.random.default_rng([seed, epoch, 1]).permutation(self.count)
            self._epoch = (seed, epoch)
        return int(self._order[place])


def item_generator(seed: int, position: int) -> np.random.Generator:
    """Random numbers of one training item, the same in whichever process and run it is made."""
    return np.random.default_rng([seed, position, 2])


def even_times(count: int) -> Tensor:
    """Times (count,) even over 0 to 1, each once, in an order that mixes them."""
    stride = next(
        each for each in range(7, count + 8) if math.gcd(each, count) == 1
    )  # so that none is left out
    return (stride * torch.arange(count) % count + 0.5) / count


def pick(points: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """`count` different rows of `points`, in fp32; if there are fewer, all of them, and some again."""
    if count <= len(points):
        index = rng.choice(len(points), count, replace=False, shuffle=False)
    else:
        again = rng.integers(0, len(points), count - len(points))
        index = np.concatenate([rng.permutation(len(points)), again])
    return points[torch.from_numpy(index)].float()


def field_queries(shapes: PreparedShapes, id: str, near: int, volume: int, rng: np.random.Generator) -> Batch:
    """`points` (Q,3) with their signed `distance` (Q,): those near the surface of a shape, then those anywhere in its
    box."""
    counts = {"near": near, "volume": volume}
    rows = torch.cat([pick(shapes.read(id, name), count, rng) for name, count in counts.items()])
    return {"points": rows[:, :3].contiguous(), "distance": rows[:, 3].contiguous()}


class _ByPosition(Dataset):
    def __init__(self, items: Items, seed: int) -> None:
        self.items, self.seed = items, seed

    def __getitem__(self, position: int) -> Batch:
        return self.items.item(position, self.seed)


def micro_batches(
    items: Items, config: LoopConfig, start: int, process: int = 0, processes: int = 1
) -> Iterator[list[Batch]]:
    """For each step from `start` on: this process' micro-batches, which depend on step and seed alone.

    The global batch is the same for any number of processes.
    """
    size = config.micro_batch(processes)
    firsts = (
        step * config.batch + (micro * processes + process) * size
        for step in range(start, config.steps)
        for micro in range(config.accumulate)
    )
    loader = DataLoader(
        _ByPosition(items, config.seed),
        batch_sampler=(list(range(first, first + size)) for first in firsts),
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
    )
    batches = iter(loader)
    while group := list(islice(batches, config.accumulate)):
        yield group
