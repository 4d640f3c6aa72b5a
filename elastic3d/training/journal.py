"""What a run tells while it trains: a progress bar, `metrics.jsonl`, TensorBoard scalars, images of meshes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elastic3d.errors import NoSurfaceError
from elastic3d.geometry.decode import decode_field
from elastic3d.geometry.options import DecodeConfig
from elastic3d.geometry.render import Scene, orbit_camera
from elastic3d.geometry.surface import extract_surface
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.utils.files import Number, atomic_path, check_shape, load_json_lines

METRICS_NAME = "metrics.jsonl"


class Journal:
    """The record of one run in its folder; a process that is not the main one keeps none.

    A resumed run drops the lines after the step it goes on from, so that every step is there once.
    """

    def __init__(self, folder: Path, start: int, steps: int, active: bool, title: str) -> None:
        self.folder, self.active = folder, active
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=title,
            disable=not active,
            smoothing=0.05,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = folder / METRICS_NAME
        kept = [line for line in read_metrics(self._metrics) if line["step"] <= start]
        with atomic_path(self._metrics) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` finished steps."""
        self._bar.update(step - self._bar.n)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of `step`; those of validation start with `val/`."""
        if not self.active:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 1), **rounded}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        shown = {name: f"{value:.4g}" for name, value in values.items() if name in ("loss", "learning_rate")}
        self._bar.set_postfix(shown, refresh=False)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Record images (H,W,3) uint8, in TensorBoard and as PNG under `samples/`."""
        if not self.active:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        for name, image in images.items():
            self._board.add_image(f"samples/{name}", image, step, dataformats="HWC")
            Image.fromarray(image).save(self.folder / "samples" / f"{name}-{step:08d}.png")

    def looks(self, step: int) -> tuple[bool, bool]:
        """Whether there are values of validation, and images, of `step`."""
        if not self.active:
            return False, False
        lines = [line for line in read_metrics(self._metrics) if line["step"] == step]
        values = any(name.startswith("val/") for line in lines for name in line)
        return values, any((self.folder / "samples").glob(f"*-{step:08d}.png"))

    def say(self, message: str) -> None:
        """One line on the screen that leaves the progress bar whole."""
        if self.active:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Flush everything."""
        self._bar.close()
        if self.active:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line that was cut off by a kill is left out.

    UserError for any other line that is not one of numbers with a step; a diverging loss may be NaN.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    lines = list(load_json_lines(path, {str: float}, torn=True, finite=False))
    for number, line in enumerate(lines, 1):
        check_shape(line, {"step": Number(0)}, f"{path}, line {number},")
    return lines


def field_meshes(vae: ShapeVAE, latents: Tensor, resolution: int) -> list[trimesh.Trimesh | None]:
    """Meshes of DiT-space latents (B,N,C); None where a field has no surface."""
    config, meshes = DecodeConfig(resolution=resolution), list[trimesh.Trimesh | None]()
    for tokens in vae.decode(latents).split(1):
        values, _ = decode_field(vae.field(tokens), config, latents.device)
        try:
            meshes.append(extract_surface(values))
        except NoSurfaceError:
            meshes.append(None)
    return meshes


def mesh_image(mesh: trimesh.Trimesh | None, size: int = 160) -> np.ndarray:
    """A view from the front right (size, size, 3) uint8 on white; white where there is no mesh."""
    if mesh is None:
        return np.full((size, size, 3), 255, np.uint8)
    view = Scene(mesh).render(orbit_camera(30, 20, 3.4, 40), size)
    return on_white(view.colour)


def mesh_row(vae: ShapeVAE, latents: Tensor, resolution: int) -> list[np.ndarray]:
    """A view of the mesh of each of DiT-space latents (B,N,C)."""
    return [mesh_image(mesh) for mesh in field_meshes(vae, latents, resolution)]


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Straight-alpha RGBA (H,W,4) uint8 over white -> (H,W,3) uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Images of one size (H,W,3) in rows of one length -> one image."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
