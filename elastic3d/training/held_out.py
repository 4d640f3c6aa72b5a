"""What a model makes of held-out shapes, and the baseline it has to beat, as folders of meshes.

`<output>/gt`, `images`, `reconstruction` (through the VAE alone), `seed-<s>` (from the image) and `nearest`: the
training shape whose views are most like the image, by cosine similarity of the image encoder's global feature. It
is the baseline that single-image reconstruction most often fails to beat (Tatarchenko et al., 1905.03678).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.evaluation.items import spread
from elastic3d.geometry.cleanup import clean
from elastic3d.geometry.mesh_io import load_mesh, save_mesh
from elastic3d.geometry.normalize import normalize_mesh
from elastic3d.geometry.options import CleanupConfig
from elastic3d.geometry.solid import solidify
from elastic3d.models.images import prepare_image, to_tensor
from elastic3d.models.options import ForegroundConfig
from elastic3d.models.weights import read_weights, save_weights
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME, ImageTo3DPipeline
from elastic3d.pipelines.runtime import find_model
from elastic3d.preparation.options import SourceName
from elastic3d.preparation.prepare import open_source
from elastic3d.preparation.shards import finished_sidecars
from elastic3d.training.datasets import PreparedShapes, item_generator, read_split
from elastic3d.training.journal import contact_sheet, field_meshes, mesh_image, on_white
from elastic3d.training.options import HeldOutConfig
from elastic3d.training.vae import VAEItems, VAEStageConfig
from elastic3d.training.views import stored_views
from elastic3d.utils.claims import SETTINGS_NAME, claim_folder, sole_use
from elastic3d.utils.files import atomic_path, file_sha256
from elastic3d.utils.options import to_dict

SHEET_SHAPES = 64
IMAGE_SIZE = 128
# of a model folder: what decides its meshes beside the weights
_DEFAULTS = (PIPELINE_NAME, "dial.json", "routers/*.json")


def build_held_out(config: HeldOutConfig) -> list[str]:
    """Write every folder; meshes that are there already stay. -> ids of the held-out shapes.

    Raises:
        UserError: no shard holds a shape of the split, the model can't be loaded, the folder has meshes of another
            model, of shapes that were prepared otherwise or of other options, or the meshes are missing that the
            nearest training shape is made from again.
    """
    path = config.data.path
    if config.data.source is SourceName.folder and not (path and Path(path).is_dir()):
        raise UserError(
            f"data.path is {path!r}, expected the directory with your meshes for data.source=folder"
        )
    pipeline = ImageTo3DPipeline.from_pretrained(config.model, config.device, config.dtype)
    shapes = PreparedShapes(Path(config.data.output), _listed(config.split, config), limit=config.limit)
    with sole_use(config.output):
        _claim(config, shapes.ids)
        _write_truth(shapes, config)
        _write_reconstructions(pipeline, shapes, config)
        for seed in config.seeds:
            _write_generated(pipeline, shapes, seed, config)
        _write_nearest(pipeline, shapes, config)
        write_sheet(shapes.ids, config)
    return shapes.ids


def _claim(config: HeldOutConfig, ids: Sequence[str]) -> None:
    """Note what the meshes are made with before any is there; refuse a folder of others, which would stay."""
    names = ("view", "steps", "guidance", "resolution", "surface_points", "bank_views")
    settings = {name: value for name, value in to_dict(config).items() if name in names}
    model = find_model(Path(config.model))
    read_split([config.train])  # says where it is no list
    settings |= {
        "source": _source(config),
        "model": file_sha256(*sorted(model.glob("**/*.safetensors"))),
        "train": file_sha256(config.train),
    }
    later = {  # which older folders did not note, nor those with other shapes
        "pipeline": file_sha256(*sorted(path for name in _DEFAULTS for path in model.glob(name))),
        "data.shape.resolution": config.data.shape.resolution,
    } | {f"preparation of {id}": digest for id, digest in _prepared(config, ids).items()}
    begun = (config.output / SETTINGS_NAME).is_file() and any(config.output.glob("images/*.png"))
    claim_folder(config.output, settings | later, begun, later)


def _prepared(config: HeldOutConfig, ids: Sequence[str]) -> dict[str, str]:
    """Digest of how each of the shapes was prepared, and from which file."""
    found = {}
    for _, described in finished_sidecars(Path(config.data.output) / _source(config)):
        for row in described["items"]:
            facts = json.dumps([row, described["settings"]], sort_keys=True)
            found[f"{_source(config)}/{row['id']}"] = hashlib.sha256(facts.encode()).hexdigest()
    return {id: found[id] for id in ids if id in found}


def _source(config: HeldOutConfig) -> str:
    """The name that ids of the source begin with."""
    return config.data.name or config.data.source.value


def _listed(split: Path, config: HeldOutConfig) -> list[str]:
    """The shapes of the source that a list names. UserError if there are none."""
    source = _source(config)
    found = [id for id in read_split([split]) if id.startswith(f"{source}/")]
    if not found:
        raise UserError(f"{split} names no shape of {source}, expected lines such as {source}/chair")
    return found


def stem(id: str) -> str:
    """File name of a shape: its id without the source."""
    return id.rpartition("/")[2]


def _missing(
    ids: Sequence[str], folder: Path, config: HeldOutConfig, suffix: str = ".glb"
) -> Iterator[list[str]]:
    """Batches of the shapes that have no file in a folder yet, with a progress bar."""
    todo = [id for id in ids if not (folder / f"{stem(id)}{suffix}").is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(todo), desc=folder.name, unit="shape", dynamic_ncols=True) as bar:
        for first in range(0, len(todo), config.batch_size):
            batch = todo[first : first + config.batch_size]
            yield batch
            bar.update(len(batch))


def _write_truth(shapes: PreparedShapes, config: HeldOutConfig) -> None:
    for id in chain.from_iterable(_missing(shapes.ids, config.output / "images", config, ".png")):
        views = stored_views(shapes, id)
        if config.view >= len(views):
            raise UserError(
                f"view is {config.view}, expected at most {len(views) - 1}: {id} has {len(views)} views"
            )
        with atomic_path(config.output / "images" / f"{stem(id)}.png") as path:
            views[config.view].save(path)
    stored = {id: shapes.has(id, "solid_vertices") for id in shapes.ids}
    # a shape that was in the training list when it was prepared has none
    solid = None if all(stored.values()) else _solids(config)
    for id in chain.from_iterable(_missing(shapes.ids, config.output / "gt", config)):
        if solid is not None and not stored[id]:
            mesh = solid(id)
        else:
            vertices, faces = (shapes.read(id, f"solid_{name}").numpy() for name in ("vertices", "faces"))
            mesh = trimesh.Trimesh(vertices, faces, process=False)
        save_mesh(mesh, config.output / "gt" / f"{stem(id)}.glb")


@torch.no_grad()
def _write_reconstructions(
    pipeline: ImageTo3DPipeline, shapes: PreparedShapes, config: HeldOutConfig
) -> None:
    vae, count = pipeline.vae.config, config.surface_points
    sharp_points = count if vae.sharp_latents else 0
    points = VAEStageConfig(model=vae, surface_points=count, sharp_points=sharp_points)
    items, folder = VAEItems(shapes, points), config.output / "reconstruction"
    for batch in _missing(shapes.ids, folder, config):
        drawn = default_collate([items.draw(id, item_generator(0, shapes.ids.index(id))) for id in batch])
        read = [drawn[name].to(pipeline.device) for name in ("surface", "sharp") if name in drawn]
        posterior = pipeline.vae.encode(*read)
        meshes = field_meshes(pipeline.vae, pipeline.vae.to_latents(posterior.mean), config.resolution)
        for id, mesh in zip(batch, meshes, strict=True):
            if mesh is not None:
                save_mesh(clean(mesh, CleanupConfig()), folder / f"{stem(id)}.glb")


def _write_generated(
    pipeline: ImageTo3DPipeline, shapes: PreparedShapes, seed: int, config: HeldOutConfig
) -> None:
    folder = config.output / f"seed-{seed}"
    options = {"steps": config.steps, "guidance": config.guidance, "resolution": config.resolution}
    for batch in _missing(shapes.ids, folder, config):
        images = [config.output / "images" / f"{stem(id)}.png" for id in batch]
        for id, result in zip(batch, pipeline(images, seed, **options), strict=True):
            if result.error is None:  # a failed sample leaves no file and counts as failed when it is scored
                save_mesh(result.mesh, folder / f"{stem(id)}.glb", result.metadata)


def _write_nearest(pipeline: ImageTo3DPipeline, shapes: PreparedShapes, config: HeldOutConfig) -> None:
    folder = config.output / "nearest"
    if all((folder / f"{stem(id)}.glb").is_file() for id in shapes.ids):
        return
    features = _features(pipeline)
    names, bank = _bank(features, config)
    solid = _solids(config)
    for id in chain.from_iterable(_missing(shapes.ids, folder, config)):
        image = Image.open(config.output / "images" / f"{stem(id)}.png")
        similarity = (bank @ features([image])[0]).amax(dim=1)
        found = names[int(similarity.argmax())]
        save_mesh(solid(found), folder / f"{stem(id)}.glb", {"nearest": found})


def _features(pipeline: ImageTo3DPipeline) -> Callable[[Sequence[Image.Image]], Tensor]:
    """Images -> unit global features (V, 1280)."""
    encoder, foreground = pipeline.encoder, ForegroundConfig().for_encoder(pipeline.encoder.config)

    def features(images: Sequence[Image.Image]) -> Tensor:
        ready = [prepare_image(image, foreground, encoder.image_size) for image in images]
        found = encoder.pooled(to_tensor(ready).to(pipeline.device)).float().cpu()
        return torch.nn.functional.normalize(found, dim=-1)

    return features


def _bank(
    features: Callable[[Sequence[Image.Image]], Tensor], config: HeldOutConfig
) -> tuple[list[str], Tensor]:
    """Ids of the training shapes and their features (S, V, 1280); computed once and kept beside the meshes."""
    shapes = PreparedShapes(Path(config.data.output), _listed(config.train, config))
    path = config.output / "bank.safetensors"
    bank = read_weights(path) if path.is_file() else {}
    todo = [id for id in shapes.ids if id not in bank]
    bar = tqdm(todo, desc="bank", unit="shape", dynamic_ncols=True)
    for id in bar:
        try:
            views = stored_views(shapes, id)
        except UserError as error:
            bar.write(f"skipped: {error}")
            continue
        chosen = np.linspace(0, len(views) - 1, config.bank_views).round().astype(int)
        bank[id] = features([views[i] for i in chosen]).half()
    if todo:
        save_weights(bank, path)
    names = [id for id in shapes.ids if id in bank]
    return names, torch.stack([bank[id] for id in names]).float()


def _solids(config: HeldOutConfig) -> Callable[[str], trimesh.Trimesh]:
    """Shape by id -> its outer surface, made again from the source's own mesh."""
    source = open_source(config.data)
    items = {f"{item.source}/{item.id}": item for item in source.items()}

    def solid(id: str) -> trimesh.Trimesh:
        if id not in items:
            raise UserError(
                f"{id} is not in the source {config.data.source.value}, expected it as when it was prepared"
            )
        mesh, _ = normalize_mesh(source.load(items[id]).mesh)
        return solidify(mesh, config.data.shape.resolution)

    return solid


def write_sheet(ids: Sequence[str], config: HeldOutConfig) -> None:
    """`sheet.png`: input view, generated (first seed), ground truth, nearest training shape; four shapes a row."""
    chosen = spread(ids, SHEET_SHAPES)
    folders = ([f"seed-{config.seeds[0]}"] if config.seeds else ["reconstruction"]) + ["gt", "nearest"]
    cells = []
    for id in chosen:
        view = Image.open(config.output / "images" / f"{stem(id)}.png").resize((IMAGE_SIZE, IMAGE_SIZE))
        paths = [config.output / folder / f"{stem(id)}.glb" for folder in folders]
        meshes = [load_mesh(path) if path.is_file() else None for path in paths]  # white where one failed
        cells.append([on_white(np.asarray(view)), *(mesh_image(mesh, IMAGE_SIZE) for mesh in meshes)])
    blank = [np.full_like(cells[0][0], 255)] * len(cells[0])
    cells += [blank] * (-len(cells) % 4)
    rows = [[image for cell in cells[i : i + 4] for image in cell] for i in range(0, len(cells), 4)]
    with atomic_path(config.output / "sheet.png") as path:
        Image.fromarray(contact_sheet(rows)).save(path)
