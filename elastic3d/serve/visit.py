"""What the buttons of the web app do: jobs for a visitor's choices, and what is shown and downloaded of their
meshes."""

from __future__ import annotations

import html
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import trimesh
from PIL import Image
from pydantic import ValidationError
from scipy.spatial import cKDTree

from elastic3d.errors import UserError
from elastic3d.evaluation.html import encoded, pack_surface
from elastic3d.geometry.cleanup import simplify
from elastic3d.geometry.mesh_io import save_mesh
from elastic3d.geometry.normalize import scale_to, with_up
from elastic3d.models.images import prepare_image
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.preview import draw_routes, route_title, turntable
from elastic3d.serve.models import ModelInfo
from elastic3d.serve.queue import Job, JobState, MeshQueue, MeshRequest, QueueFull, sentence
from elastic3d.serve.uploads import decode_image

MASK_SIDE, TILE_SIDE = 256, 224
MOST_FACES = 60_000  # of a mesh that is sent to the browser
LINES, WIDEST = 90, 400  # pixels above and below the canvases, and of a canvas
POLL_S = 0.1
ERROR_S = 30.0  # that an error stays on the page
HEADERS = ("mesh", "seconds", "DiT, s", "FLOPs", "faces", "for a print")
STOPPED = "Stopped."
OWN = "budget"  # the choice of the quality where the budget's slider counts


@dataclass(frozen=True)
class Choices:
    """What the page's controls say, in the order in which the button sends them."""

    image: Image.Image | None
    model: str
    quality: str
    budget: float
    compare: bool
    colours: bool
    seed: float | None
    samples: float
    ensemble: float
    steps: float
    resolution: float
    faces: float | None
    tolerance: float
    border: float

    def requests(self, info: ModelInfo) -> tuple[list[MeshRequest], list[MeshRequest]]:
        """One for each sample, and the same of the dense model where both are wanted. UserError out of range; an empty
        field is the default."""
        base: dict[str, Any] = {
            "model": self.model, "resolution": self.resolution, "max_faces": self.faces, "tolerance": self.tolerance,
            "border": self.border, "format": "ply", "texture": "project" if self.colours else "none",
        }  # fmt: skip
        if info.dial is None:
            base["steps"] = self.steps
        chosen, budget = base | {"ensemble": self.ensemble}, round(self.budget, 4)
        if info.dial is not None and self.quality != OWN:
            chosen["quality"] = self.quality
        elif info.dial is not None or budget != round(info.budget, 4):
            chosen["budget"] = budget  # else the default, which depends on the steps
        seeds = [int(self.seed or 0) + i for i in range(int(self.samples))]
        try:
            made = [MeshRequest(**chosen, seed=seed) for seed in seeds]
            dense = [MeshRequest(**base, seed=seed, elastic=False) for seed in seeds]
        except ValidationError as error:
            raise UserError(sentence(error.errors())) from error
        return made, dense if info.elastic and self.compare else []


@dataclass
class Made:
    """One mesh: a .ply, its name on the page, how it was made."""

    path: Path
    name: str
    faces: int
    metadata: dict[str, Any]

    @property
    def mesh(self) -> trimesh.Trimesh:
        """With its normals and colours."""
        return trimesh.load_mesh(self.path, process=False)

    @property
    def share(self) -> str:
        """Of the dense FLOPs."""
        return f"{self.metadata['flops_executed'] / max(self.metadata['flops_dense'], 1):.0%}"

    @property
    def seconds(self) -> float:
        """From the image to the mesh, without the wait for others."""
        return sum(self.metadata["ms"].values()) / 1000

    @property
    def note(self) -> str:
        """Below its name."""
        return f"{self.share} of the FLOPs, DiT {self.metadata['ms']['dit'] / 1000:.1f} s"

    def row(self) -> list[str]:
        """Of the table."""
        found = self.metadata["print"]
        solid = "watertight" if found["watertight"] else "not watertight"
        pieces = "1 piece" if found["pieces"] == 1 else f"{found['pieces']} pieces"
        return [
            self.name, f"{self.seconds:.1f}", f"{self.metadata['ms']['dit'] / 1000:.1f}", self.share,
            f"{self.faces:,}", f"{solid}, {pieces}",
        ]  # fmt: skip


@dataclass
class Shown:
    """What a visitor made last: a folder of files, which goes with the visit."""

    folder: Path | None = None
    elastic: list[Made] = field(default_factory=list)
    dense: list[Made] = field(default_factory=list)

    def forget(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def doubts(self) -> str:
        """What to say of the colours."""
        poor = any("warning" in made.metadata.get("texture", {}) for made in self.elastic)
        return "The shape differs from the image: colours may be misplaced." if poor else ""

    def view(self, index: int) -> str:
        """A sample in the viewer, the dense one at its left where there is one."""
        side = self.dense[index : index + 1]
        return frame([(made.mesh, made.name, made.note) for made in [*side, self.elastic[index]]])


def failed(error: object) -> gr.Error:
    """What goes wrong, as the page shows it: text, whatever an image or a prompt is called."""
    return gr.Error(html.escape(str(error)), duration=ERROR_S, print_exception=False)


def opened(payload: Any, max_pixels: int) -> Image.Image | None:
    """The image of an upload, in the place of Gradio's own reader. gr.Error if it is none, or too large."""
    if payload is None or payload.path is None:
        return None
    try:
        return decode_image(Path(payload.path).read_bytes(), max_pixels)
    except (UserError, OSError) as error:
        raise failed(error) from error


def masked(image: Image.Image | None, tolerance: float, border: float) -> Image.Image | None:
    """The object as the model will see it. gr.Error if there is none."""
    if image is None:
        return None
    try:
        return prepare_image(image, ForegroundConfig(tolerance=int(tolerance), border=border), MASK_SIDE)
    except UserError as error:
        raise failed(error) from error


class Visits:
    """The jobs and the newest meshes of all visitors, by the session of their pages."""

    def __init__(self, queue: MeshQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._stops: set[tuple[str, threading.Event]] = set()  # of what is being made, by session
        self._shown: dict[str, Shown] = {}

    def generate(self, choices: Choices, session: str, progress: gr.Progress) -> Shown:
        """Jobs for all samples, and their meshes when all are done. gr.Error where one fails, or all are stopped."""
        if choices.image is None:
            raise failed("There is no image yet: drop one, or draw a prompt.")
        jobs, stopped = list[Job](), threading.Event()
        self._stops.add((session, stopped))
        try:
            info = self._queue.models.info(choices.model)  # may take as long as a model takes to load
            elastic, dense = choices.requests(info)
            if stopped.is_set():
                raise failed(STOPPED)
            for request in [*elastic, *dense]:
                jobs.append(self._queue.submit(choices.image, request, held=True))
            while not (stopped.is_set() or all(job.finished.is_set() for job in jobs)):
                done = float(np.mean([job.progress for job in jobs]))
                stage = "waiting" if done == 0 else "sampling" if done < 0.5 else "decoding"
                progress(done, desc=stage)
                time.sleep(POLL_S)
            return self._kept(session, _shown(jobs, len(elastic)), stopped)
        except UserError as error:
            raise failed(error) from error
        except QueueFull as error:
            raise failed(f"{error}: try again in a moment.") from error
        finally:
            for job in jobs:
                self._queue.cancel(job)
            self._stops.remove((session, stopped))

    def _kept(self, session: str, made: Shown, stopped: threading.Event) -> Shown:
        """What was made, in the place of what was before. gr.Error, and nothing stays, where nobody waits for it."""
        with self._lock:
            if stopped.is_set():
                made.forget()
                raise failed(STOPPED)
            before, self._shown[session] = self._shown.get(session, Shown()), made
        before.forget()
        return made

    def stop(self, session: str) -> None:
        """Give up what a visitor waits for."""
        for owner, stopped in list(self._stops):
            if owner == session:
                stopped.set()

    def leave(self, session: str) -> None:
        """Nothing of a visitor stays."""
        with self._lock:
            self.stop(session)
            left = self._shown.pop(session, Shown())
        left.forget()


def _shown(jobs: list[Job], elastic: int) -> Shown:
    """Copies of the finished meshes. gr.Error with the first failure."""
    for job in jobs:
        if job.state is not JobState.done:
            raise failed(job.error or STOPPED)
    shown = Shown()
    try:
        shown.folder = Path(tempfile.mkdtemp(prefix="elastic3d-", dir=os.environ.get("GRADIO_TEMP_DIR")))
        _copy(jobs, elastic, shown)
    except OSError as error:
        shown.forget()
        raise failed(f"The server can't keep the mesh: {error.strerror or error}.") from error
    return shown


def _copy(jobs: list[Job], elastic: int, shown: Shown) -> None:
    """The files of jobs, in the folder of `shown`."""
    assert shown.folder is not None
    for index, job in enumerate(jobs):
        assert job.file is not None
        kind, seed = "elastic" if index < elastic else "dense", job.request.seed
        path = shown.folder / f"{kind}-{seed}.ply"
        shutil.copyfile(job.file, path)
        name = f"{kind}, seed {seed}" if "routes" in job.metadata or kind == "dense" else f"seed {seed}"
        faces = len(trimesh.load_mesh(path, process=False).faces)
        (shown.elastic if kind == "elastic" else shown.dense).append(Made(path, name, faces, job.metadata))


def table(rows: list[list[str]]) -> str:
    """What it took, as HTML."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{name}</th>" for name in HEADERS)
    return f"<div><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def tiles(shown: Shown) -> list[tuple[Image.Image, str]]:
    """A small image of every sample, and its name."""
    return [(turntable(made.mesh, 1, TILE_SIDE), f"seed {made.metadata['seed']}") for made in shown.elastic]


def route_image(shown: Shown, index: int) -> str | None:
    """The file of what every block of a sample did; None where no model with routers ran."""
    made = shown.elastic[index]
    if "routes" not in made.metadata:
        return None
    path = made.path.with_suffix(".png")
    draw_routes([(route_title("elastic", made.metadata), made.metadata["routes"])], path)
    return str(path)


def download(shown: Shown, index: int, kind: str, up: str, size: float) -> Any:
    """The button for a sample in its real size: glTF counts in metres, the other formats are written in mm.

    gr.Error for a size that is none.
    """
    if not shown.elastic:
        return gr.DownloadButton(interactive=False)
    made = shown.elastic[index]
    try:
        mesh = scale_to(with_up(made.mesh, up), float(size or 0), f".{kind}")
        target = made.path.with_name(f"{made.path.stem}-{up}-{size:g}mm.{kind}")
        save_mesh(mesh, target, extras=made.metadata, name="mesh")
    except UserError as error:
        raise failed(error) from error
    return gr.DownloadButton(f"Download .{kind}, {size:g} mm", value=str(target), interactive=True)


def frame(meshes: Sequence[tuple[trimesh.Trimesh, str, str]]) -> str:
    """An iframe that shows meshes side by side, turned by one camera, each with a name and a note above it; vertex
    colours are shown where there are any.

    The frame's page reaches neither the network nor the page around it.
    """
    shown = [_packed(mesh) | {"name": name, "note": note} for mesh, name, note in meshes]
    page = (resources.files("elastic3d.serve") / "assets" / "viewer.html").read_text(encoding="utf-8")
    script = resources.files("elastic3d.evaluation") / "assets" / "viewer.js"
    page = page.replace("@@viewer.js@@", script.read_text(encoding="utf-8"))
    page = page.replace("@@meshes@@", json.dumps(shown, allow_nan=False).replace("<", "\\u003c"))
    side = f"min({WIDEST}px, {100 // len(shown)}cqw)"
    style = f"width: 100%; height: calc({LINES}px + {side}); border: 0"
    return (
        '<div style="container-type: inline-size">'
        f'<iframe title="Meshes" sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(page)}"></iframe></div>'
    )


def _packed(mesh: trimesh.Trimesh) -> dict[str, Any]:
    shown = simplify(mesh, MOST_FACES) if len(mesh.faces) > MOST_FACES else mesh
    packed = pack_surface(shown)
    visual = mesh.visual
    if isinstance(visual, trimesh.visual.ColorVisuals) and visual.kind == "vertex":
        colours = np.asarray(visual.vertex_colors, np.uint8)
        if shown is not mesh:
            colours = colours[cKDTree(mesh.vertices).query(shown.vertices)[1]]
        packed["colours"] = encoded(np.ascontiguousarray(colours))
    return packed
