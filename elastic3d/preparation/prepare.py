"""From a source of meshes to a folder of shards: what `scripts/prepare_data.py` does."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.preparation.infinigen_source import InfinigenSource
from elastic3d.preparation.options import PrepareConfig, SourceName
from elastic3d.preparation.primitives.source import PrimitivesSource
from elastic3d.preparation.run import prepare
from elastic3d.preparation.shards import Recipe, Shard, drop_outdated, plan_shards, write_manifest
from elastic3d.preparation.sources import FolderSource, Source
from elastic3d.preparation.splits import Split, folder_split, read_splits, write_folder_split
from elastic3d.preparation.sweethome3d import SweetHome3DSource, find_package


@dataclass(frozen=True)
class Summary:
    """What a run has left on disk."""

    folder: Path
    prepared: int
    failures: dict[str, str]  # reason by id


def cache_folder(chosen: str) -> Path:
    """Where downloads and raw meshes are kept: `cache_dir=`, or the user's cache folder."""
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic3d"


def open_source(config: PrepareConfig) -> Source:
    """The source that the options name. UserError if it can't be had."""
    cache = cache_folder(config.cache_dir)
    if config.source is SourceName.infinigen:
        environment = Path(config.infinigen_env) if config.infinigen_env else cache / "infinigen-env"
        raw = cache / "raw" / "infinigen"
        return InfinigenSource(raw, environment, config.categories, config.seeds, config.generators)
    if config.source is SourceName.sweethome3d:
        downloads = cache / "sweethome3d"
        return SweetHome3DSource(find_package(downloads, config.path), downloads)
    if config.source is SourceName.primitives:
        return PrimitivesSource(config.categories, config.shapes)
    if not config.path:
        raise UserError("source=folder needs path=, the directory with your meshes")
    return FolderSource(Path(config.path), config.name or "folder")


def prepare_data(config: PrepareConfig) -> Summary:
    """Prepare every shard that is missing and rebuild the manifest; run it again to go on where it was."""
    held_out = {name for name, split in read_splits(Path(config.splits)).items() if split is not Split.train}
    source = open_source(config)
    items = source.items()[: config.limit or None]
    folder = Path(config.output) / (config.name or source.name)
    _make_writable(folder)
    if config.source is SourceName.folder:
        held_out |= set(
            folder_split([f"{item.source}/{item.id}" for item in items], config.val_share, config.seed)[1]
        )
    shards = plan_shards(items, folder, config.shard_size)
    recipe = Recipe(config.shape, config.seed, frozenset(held_out))
    drop_outdated(shards, recipe)
    _prepare_with_bar(shards, source, recipe, config)
    count, failures = write_manifest(folder)
    if config.source is SourceName.folder and count:
        write_folder_split(
            folder, [f"{item.source}/{item.id}" for item in items if item.id not in failures], held_out
        )
    return Summary(folder, count, failures)


def next_commands(config: PrepareConfig) -> list[str]:
    """The commands that fine-tune the bundled model on a user's prepared meshes, in their order."""
    name, output = config.name or "folder", Path(config.output)
    given = f"init_from=shape-small latents.output={output / f'latents-{name}'}"
    if config.output != PrepareConfig().output:
        given += f" data.prepared={output}"
    given += f" data.train=[{output / name / 'train.txt'}] data.val=[{output / name / 'val.txt'}]"
    return [
        f"python scripts/train.py stage=cache {given}",
        f"python scripts/train.py stage=dit name={name} steps=2000 learning_rate=5e-4 {given}",
        f"python scripts/train.py stage=export name={name}",
    ]


def _prepare_with_bar(shards: list[Shard], source: Source, recipe: Recipe, config: PrepareConfig) -> None:
    seen = {item.id for shard in shards if shard.done for item in shard.items}
    with tqdm(total=sum(len(shard.items) for shard in shards), initial=len(seen), unit="shape") as bar:

        def progress(name: str, reason: str) -> None:
            if reason:
                bar.write(f"skipped {name}: {reason}", file=sys.stderr)
            if name not in seen:  # a shard that is begun again reports its first shapes twice
                seen.add(name)
                bar.update()

        workers = config.workers or os.cpu_count() or 1
        prepare(shards, source, recipe, workers, config.timeout, progress)


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"can't write to {folder}: permission denied")
