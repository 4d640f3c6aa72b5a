"""The web app: drop an image, see its mask, turn the dial, compare dense and elastic side by side. Gradio."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import trimesh
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no request leaves the machine
import gradio as gr  # noqa: E402

from elastic3d.diffusion.dial import Dial  # noqa: E402
from elastic3d.diffusion.options import Quality  # noqa: E402
from elastic3d.errors import UserError  # noqa: E402
from elastic3d.geometry.export import scale_to  # noqa: E402
from elastic3d.geometry.mesh_io import load_mesh, save_mesh  # noqa: E402
from elastic3d.models.foreground import prepare_image  # noqa: E402
from elastic3d.models.options import ForegroundConfig  # noqa: E402
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline  # noqa: E402
from elastic3d.pipelines.preview import turntable  # noqa: E402
from elastic3d.pipelines.routes import draw_routes, route_title  # noqa: E402
from elastic3d.serve.queue import Job, JobState, MeshQueue, MeshRequest, QueueFull  # noqa: E402

MASK_SIDE = 256
GAP = 0.4  # between two meshes that are shown in one scene, in units of a mesh's half side
GREY, BLUE = (
    [0.6, 0.6, 0.6, 1.0],
    [0.35, 0.55, 0.85, 1.0],
)  # of the dense and of the elastic mesh, side by side
POLL_S = 0.1
KEEP_S = 900
FONTS = ["system-ui", "sans-serif"]  # of the visitor's machine
CSS = "footer {display: none !important} .gradio-container {max-width: 1200px !important}"

# In the order in which `_Visit.generate` takes them.
OPTIONS = ["image", "quality", "budget", "compare", "seed", "samples", "steps", "resolution", "faces"]
OPTIONS += ["tolerance", "border"]

Draw = Callable[[str, int], Image.Image]
"""(prompt, seed) -> an image of it."""


@dataclass
class Shown:
    """What a visitor made last: files, and what is said of each sample."""

    elastic: list[Path] = field(default_factory=list)
    dense: list[Path] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    routes: Path | None = None


def build_app(queue: MeshQueue, draw: Draw | None = None) -> gr.Blocks:
    """The page around a queue. `draw` makes images of prompts; without it there is no field for a prompt."""
    pipeline = queue.pipeline
    title = f"elastic3d: {pipeline.config.model}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, KEEP_S)) as app:
        gr.Markdown(f"# {title}\nDrop an image of one object on a plain or transparent background.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                asked = _asked(pipeline, draw is not None)
            with gr.Column(scale=3, min_width=300):
                answer = _answer(pipeline.session is not None)
        shown, chosen = gr.State(Shown()), gr.State(0)
        look = [asked.image, asked.tolerance, asked.border]
        for changed in (asked.image.change, asked.tolerance.release, asked.border.release):
            changed(_mask, look, asked.mask, show_progress="hidden")
        if draw is not None:
            prompt = [asked.prompt, asked.seed]
            asked.prompt.submit(lambda text, number: _drawn(draw, text, number), prompt, asked.image)
        options = [getattr(asked, name) for name in OPTIONS]
        results = [answer.viewer, answer.table, answer.gallery, answer.routes, shown, chosen]
        file = [shown, chosen, answer.kind, answer.size]
        making = asked.run.click(_Visit(queue).generate, options, results)
        making.then(_file, file, answer.download)
        asked.stop.click(None, cancels=[making])
        answer.gallery.select(_pick, shown, [answer.viewer, chosen]).then(_file, file, answer.download)
        for changed in (answer.kind.change, answer.size.change):
            changed(_file, file, answer.download, show_progress="hidden")
    return app


def _asked(pipeline: ImageTo3DPipeline, prompts: bool) -> SimpleNamespace:
    """The left column: what a visitor gives and chooses, by name."""
    routed, dial = pipeline.session is not None, pipeline.dial
    image = gr.Image(label="Image", type="pil", image_mode="RGBA", sources=["upload", "clipboard"])
    prompt = gr.Textbox(label="or a prompt", visible=prompts, submit_btn="Draw")
    mask = gr.Image(label="What the model will see", interactive=False, height=220, elem_id="mask")
    with gr.Accordion("Mask", open=False):
        tolerance = gr.Slider(0, 120, 20, step=1, label="Background tolerance")
        border = gr.Slider(0, 0.5, 0.15, step=0.01, label="Free border")
    quality = gr.Radio(
        _qualities(dial), value=Quality.default.name, label="Quality", visible=dial is not None,
        info="speed-up of the DiT, IoU to the mesh of 100 dense steps",
    )  # fmt: skip
    budget = gr.Slider(
        0.3, 1, _default_budget(pipeline), step=0.05, label="Budget", visible=routed and dial is None,
        info="share of the dense model's computation",
    )  # fmt: skip
    compare = gr.Checkbox(value=False, label="Dense beside it", visible=routed)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        samples = gr.Slider(1, 8, 1, step=1, label="Samples")
    with gr.Accordion("More", open=False):
        steps = gr.Slider(1, 100, pipeline.config.steps, step=1, label="Steps", visible=dial is None)
        cells = pipeline.config.resolution
        resolution = gr.Slider(32, 512, cells, step=8, label="Resolution (grid cells a side)")
        faces = gr.Number(40_000, label="Most faces", precision=0, minimum=100)
    with gr.Row():
        run, stop = gr.Button("Make mesh", variant="primary"), gr.Button("Stop")
    return SimpleNamespace(
        image=image, prompt=prompt, mask=mask, tolerance=tolerance, border=border, quality=quality, budget=budget,
        compare=compare, seed=seed, samples=samples, steps=steps, resolution=resolution, faces=faces, run=run,
        stop=stop,
    )  # fmt: skip


def _answer(routed: bool) -> SimpleNamespace:
    """The right column: what was made, by name."""
    viewer = gr.Model3D(
        label="Mesh (left, grey: dense)" if routed else "Mesh", clear_color=(0.95, 0.95, 0.95, 1), height=420
    )
    table = gr.Dataframe(
        headers=["sample", "seconds", "DiT ms", "executed", "faces", "closed"],
        label="What it took", interactive=False, wrap=True,
    )  # fmt: skip
    gallery = gr.Gallery(label="Samples", columns=2, height=220, allow_preview=False, object_fit="contain")
    routes = gr.Image(
        label="Blocks over steps: blue executed, orange cached, grey skipped",
        visible=routed,
        interactive=False,
    )
    with gr.Row():
        kind = gr.Radio(["glb", "stl", "obj", "ply"], value="glb", label="Format")
        size = gr.Number(100, label="Longest side in mm", minimum=0.001)
        download = gr.DownloadButton("Download", interactive=False)
    return SimpleNamespace(
        viewer=viewer, table=table, gallery=gallery, routes=routes, kind=kind, size=size, download=download
    )


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Serve the page with fonts of the visitor's machine; returns what Gradio's `launch` does."""
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    return app.queue(max_size=64).launch(theme=theme, css=CSS, share=False, **options)


def _default_budget(pipeline: Any) -> float:
    elastic = pipeline.config.elastic
    return float(elastic.budget) if elastic.elastic else 1.0


def _qualities(dial: Dial | None) -> list[tuple[str, str]]:
    """What the radio shows, and its values."""
    if dial is None:
        return [(Quality.default.name, Quality.default.name)]
    rows = [(quality.name, dial.named(quality)) for quality in Quality]
    return [(f"{name} ({row.speedup['1']:.1f}x, {row.iou:.2f})", name) for name, row in rows]


def _mask(image: Image.Image | None, tolerance: int, border: float) -> Image.Image | None:
    if image is None:
        return None
    try:
        return prepare_image(image, ForegroundConfig(tolerance=int(tolerance), border=border), MASK_SIDE)
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _drawn(draw: Draw, prompt: str, seed: float) -> Image.Image:
    try:
        return draw(prompt, int(seed))
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


class _Visit:
    """What the button does."""

    def __init__(self, queue: MeshQueue) -> None:
        self._queue = queue

    def generate(
        self,
        image: Image.Image | None,
        quality: str,
        budget: float,
        compare: bool,
        seed: float,
        samples: float,
        steps: float,
        resolution: float,
        faces: float,
        tolerance: float,
        border: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio asks for it)
    ) -> Iterator[tuple[Any, ...]]:
        """Jobs for all samples; the page is brought up to date when they are done."""
        if image is None:
            raise gr.Error("There is no image yet: drop one, or draw a prompt.", print_exception=False)
        pipeline = self._queue.pipeline
        routed, dialled = pipeline.session is not None, pipeline.dial is not None
        base = MeshRequest(
            steps=None if dialled else int(steps), resolution=int(resolution), max_faces=int(faces),
            tolerance=int(tolerance), border=border,
        )  # fmt: skip
        seeds = [int(seed) + i for i in range(int(samples))]
        chosen = replace(base, quality=quality) if dialled else base
        if routed and not dialled:
            chosen = replace(base, budget=round(budget, 4))
        elastic = [replace(chosen, seed=s) for s in seeds]
        dense = [replace(base, seed=s, elastic=False) for s in seeds] if routed and compare else []
        jobs: list[Job] = []
        try:
            for request in [*elastic, *dense]:
                jobs.append(self._queue.submit(image, request))
            while not all(job.finished.is_set() for job in jobs):
                done = float(np.mean([job.progress for job in jobs]))
                stage = "waiting" if done == 0 else "sampling" if done < 0.5 else "decoding"
                progress(done, desc=stage)
                time.sleep(POLL_S)
            shown = _shown(jobs, len(elastic))
        except QueueFull as error:
            raise gr.Error(f"{error}: try again in a moment.", print_exception=False) from error
        finally:
            for job in jobs:
                self._queue.cancel(job)
        images = [turntable(load_mesh(path), 2, 192) for path in shown.elastic]
        yield _scene(shown, 0), shown.rows, images, shown.routes, shown, 0


def _shown(jobs: list[Job], elastic: int) -> Shown:
    """Copies of the finished meshes, and what is said of them. gr.Error with the first failure."""
    for job in jobs:
        if job.state is not JobState.done:
            raise gr.Error(job.error or "The server stops.", print_exception=False)
    folder = Path(tempfile.mkdtemp(prefix="elastic3d-", dir=_cache()))
    shown, panels = Shown(), []
    for index, job in enumerate(jobs):
        assert job.file is not None
        name = "elastic" if index < elastic else "dense"
        path = folder / f"{name}-{job.request.seed}.glb"
        path.write_bytes(job.file.read_bytes())
        (shown.elastic if index < elastic else shown.dense).append(path)
        mesh, metadata = load_mesh(path), job.metadata
        share = metadata["flops_executed"] / max(metadata["flops_dense"], 1)
        seconds = sum(metadata["ms"].values()) / 1000
        closed = "yes" if mesh.is_watertight else "no"
        label = f"{name}, seed {job.request.seed}"
        shown.rows.append(
            [label, round(seconds, 2), round(metadata["ms"]["dit"]), f"{share:.0%}", len(mesh.faces), closed]
        )
        if "routes" in metadata:
            panels.append((route_title(label, metadata), metadata["routes"]))
    if panels:
        shown.routes = folder / "routes.png"
        draw_routes(panels, shown.routes)
    return shown


def _cache() -> str | None:
    folder = os.environ.get("GRADIO_TEMP_DIR")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _scene(shown: Shown, index: int) -> str:
    """The file to show: a mesh, or dense and elastic in one scene, which one camera turns."""
    path = shown.elastic[index]
    if not shown.dense:
        return str(path)
    both = path.with_name(f"both-{index}.glb")
    scene = trimesh.Scene()
    for side, name, file, colour in ((-1, "dense", shown.dense[index], GREY), (1, "elastic", path, BLUE)):
        mesh = load_mesh(file)
        width = float(mesh.extents[0])
        offset = side * (width + GAP) / 2 - float(mesh.bounds[:, 0].mean())
        mesh.apply_translation([offset, 0, 0])
        material = trimesh.visual.material.PBRMaterial(
            name=name, baseColorFactor=colour, metallicFactor=0.0, roughnessFactor=0.7
        )
        mesh.visual = trimesh.visual.TextureVisuals(material=material)
        scene.add_geometry(mesh, node_name=name, geom_name=name)
    both.write_bytes(bytes(trimesh.exchange.gltf.export_glb(scene, include_normals=True)))
    return str(both)


def _pick(shown: Shown, event: gr.SelectData) -> tuple[str, int]:
    index = int(event.index)
    return _scene(shown, index), index


def _file(shown: Shown, index: int, kind: str, size: float) -> Any:
    """The download of the shown sample, scaled so that its longest side has `size` millimetres.

    glTF counts in metres, the other formats have no unit and are written in millimetres.
    """
    if not shown.elastic:
        return gr.DownloadButton(interactive=False)
    source = shown.elastic[index]
    mesh = scale_to(load_mesh(source), float(size), f".{kind}")
    target = source.with_name(f"{source.stem}-{size:g}mm.{kind}")
    save_mesh(mesh, target, name="mesh")
    return gr.DownloadButton(f"Download .{kind}, {size:g} mm", value=str(target), interactive=True)
