"""The web app: drop an image, see its mask, turn the dial, compare dense and elastic side by side. Gradio."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any

from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no request leaves the machine
import gradio as gr  # noqa: E402
from gradio import processing_utils  # noqa: E402

from elastic3d.diffusion.dial import resolution_of  # noqa: E402
from elastic3d.diffusion.options import Quality  # noqa: E402
from elastic3d.elastic.config import MIN_BUDGET  # noqa: E402
from elastic3d.errors import UserError  # noqa: E402
from elastic3d.models.options import ForegroundConfig  # noqa: E402
from elastic3d.serve.config import AppConfig  # noqa: E402
from elastic3d.serve.models import ModelInfo  # noqa: E402
from elastic3d.serve.queue import MeshQueue  # noqa: E402
from elastic3d.serve.visit import (  # noqa: E402
    OWN,
    Choices,
    Shown,
    Visits,
    download,
    failed,
    masked,
    opened,
    route_image,
    table,
    tiles,
)

KEEP_S = 900  # that files of a visit are kept at most
VISITORS = 16  # whose jobs wait for each other's batches; more wait before that
FONTS = ["system-ui", "sans-serif"]  # of the visitor's machine
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#table table {display: block; width: 0; min-width: 100%; overflow-x: auto}
#table table {font-variant-numeric: tabular-nums}
#table td, #table th {white-space: nowrap; padding: 4px 8px; text-align: left}
#gallery .grid-wrap {min-height: 0}
#routes img {padding-top: 28px; object-fit: contain}
#said {text-align: center}
"""
# Controls that depend on the model.
SWITCHED = ("quality", "budget", "compare", "steps", "resolution", "border")

Draw = Callable[[str, int], tuple[Image.Image, str | None]]
"""(prompt, seed) -> an image of it, and a warning where the prompt names nothing that is known."""


def build_app(
    queue: MeshQueue, draw: Draw | None = None, nouns: Sequence[str] = (), config: AppConfig | None = None
) -> gr.Blocks:
    """The page around a queue. `draw` makes images of prompts, and knows `nouns`; without it there are no prompts."""
    config, visits = config or AppConfig(), Visits(queue)
    with gr.Blocks(title="elastic3d", analytics_enabled=False, delete_cache=(min(60, KEEP_S), KEEP_S)) as app:
        gr.Markdown(
            "# elastic3d\nAn image of one object, on a plain or transparent background, becomes a mesh."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                asked = _asked(queue, nouns if draw is not None else None)
            with gr.Column(scale=3, min_width=300):
                answer = _answer()
        asked.image.preprocess = partial(opened, max_pixels=config.max_pixels)
        shown = gr.State(Shown(), time_to_live=KEEP_S, delete_callback=Shown.forget)
        chosen = gr.State(0)
        _wire_asked(asked, queue, draw)
        _wire_answer(asked, answer, visits, shown, chosen)

        def leave(request: gr.Request) -> None:
            visits.leave(str(request.session_hash))

        app.unload(leave)
    return app


def _wire_asked(asked: SimpleNamespace, queue: MeshQueue, draw: Draw | None) -> None:
    """What happens within the left column."""
    look = [asked.image, asked.tolerance, asked.border]
    for changed in (asked.image.change, asked.tolerance.release, asked.border.release):
        changed(masked, look, asked.mask, show_progress="hidden")
    if draw is not None:
        prompt = [asked.prompt, asked.seed]
        asked.prompt.submit(partial(_drawn, draw), prompt, asked.image, show_progress_on=asked.image)

    def known(name: str) -> ModelInfo:
        try:
            return queue.models.info(name)
        except UserError as error:
            raise failed(error) from error

    def switch(name: str) -> list[Any]:
        settings = _settings(known(name))
        return [gr.update(**settings[control]) for control in SWITCHED]

    def choose(name: str, quality: str) -> list[Any]:
        own = quality == OWN
        resolution = resolution_of(known(name).config, None if own else Quality[quality])
        return [gr.update(visible=own), resolution]

    controls = [getattr(asked, name) for name in SWITCHED]
    switched = asked.model.change(switch, asked.model, controls, show_progress_on=asked.said)
    switched.success(masked, look, asked.mask, show_progress="hidden")
    given = [asked.model, asked.quality]
    asked.quality.change(choose, given, [asked.budget, asked.resolution], show_progress="hidden")


def _wire_answer(
    asked: SimpleNamespace, answer: SimpleNamespace, visits: Visits, shown: gr.State, chosen: gr.State
) -> None:
    """From the button to the downloads."""

    def generate(
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio asks for it)
        *values: Any,
    ) -> list[Any]:
        made = visits.generate(Choices(*values), str(request.session_hash), progress)
        everything = [*made.elastic, *made.dense]
        gallery = gr.update(value=tiles(made), visible=len(made.elastic) > 1)
        count = "1 mesh" if len(everything) == 1 else f"{len(everything)} meshes"
        said = f"{count} in {sum(m.seconds for m in everything):.1f} s. {made.doubts()}"
        return [said, table([m.row() for m in everything]), gallery, made, *look_at(made, 0)]

    def look_at(made: Shown, index: int) -> list[Any]:
        routes = route_image(made, index)
        return [made.view(index), gr.update(value=routes, visible=routes is not None), index]

    def pick(made: Shown, event: gr.SelectData) -> list[Any]:
        if not made.elastic:
            raise failed(
                f"These meshes are gone, as they are kept for {KEEP_S // 60} minutes: make them again."
            )
        return look_at(made, int(event.index))

    def stop(request: gr.Request) -> None:
        visits.stop(str(request.session_hash))

    options = [getattr(asked, item.name) for item in fields(Choices)]
    seen = [answer.viewer, answer.routes, chosen]
    results = [asked.said, answer.table, answer.gallery, shown, *seen]
    file = [shown, chosen, answer.kind, answer.up, answer.size]
    making = asked.run.click(generate, options, results, show_progress_on=asked.said)
    making.success(download, file, answer.download, show_progress="hidden")
    asked.stop.click(stop)
    picked = answer.gallery.select(pick, shown, seen, show_progress="hidden")
    picked.success(download, file, answer.download, show_progress="hidden")
    changed = [answer.kind.change, answer.up.change, answer.size.change]
    # one after the other: the file of an earlier choice may take longer, and would stand in the last one's place
    gr.on(changed, download, file, answer.download, show_progress="hidden", trigger_mode="always_last")


def _settings(info: ModelInfo) -> dict[str, dict[str, Any]]:
    """What the controls that depend on the model show, by name."""
    dial, routed = info.dial, info.elastic
    named = [(quality.name, dial.named(quality)) for quality in Quality] if dial is not None else []
    choices = [(f"{name}: {row.speedup['1']:.1f}x, IoU {row.fidelity:.2f}", name) for name, row in named]
    lowest = MIN_BUDGET if dial is None else dial.rows[0].cost
    least = math.ceil(100 * lowest - 1e-6) / 100  # where the slider begins: what it shows can be kept
    coarsest = min(resolution_of(info.config, quality) for quality in Quality)
    return {
        "quality": {
            "choices": [*choices, ("by budget", OWN)],
            "value": Quality.default.name if dial is not None else OWN,
            "visible": dial is not None,
        },
        "budget": {"minimum": least, "value": max(info.budget, least), "visible": dial is None},
        "compare": {"value": False, "visible": routed},
        "steps": {"value": info.config.steps, "visible": dial is None},
        "resolution": {"value": info.config.resolution, "minimum": min(32, coarsest)},
        "border": {"value": info.border, "maximum": max(0.5, info.border)},
    }


def _asked(queue: MeshQueue, nouns: Sequence[str] | None) -> SimpleNamespace:
    """The left column: what a visitor gives and chooses, by name."""
    names, settings, asked = queue.models.names, _settings(queue.models.info()), SimpleNamespace()
    with gr.Row():
        asked.image = gr.Image(
            label="Image", type="pil", image_mode="RGBA", sources=["upload", "clipboard"], height=260, min_width=140,
            elem_id="image", buttons=[], format="png",  # a mesh is made from what is sent back: no loss
        )  # fmt: skip
        asked.mask = gr.Image(
            label="What the model sees", interactive=False, height=260, min_width=140, elem_id="mask", buttons=[],
            format="png",
        )  # fmt: skip
    asked.prompt = gr.Textbox(
        label="or a prompt", placeholder="a wooden bar chair", visible=nouns is not None, submit_btn="Draw",
        lines=1, max_lines=1,
    )  # fmt: skip
    if nouns:
        with gr.Accordion("What it can draw", open=False):
            gr.Markdown(", ".join(nouns))
    with gr.Accordion("Correct the mask", open=False):
        asked.tolerance = gr.Slider(
            0, 120, ForegroundConfig.tolerance, step=1, label="Background tolerance",
            info="more: what is nearly of the background's colour goes too",
        )  # fmt: skip
        asked.border = gr.Slider(
            step=0.001, label="Free border", info="share of the square's side", **settings["border"]
        )
    asked.model = gr.Dropdown(list(names), value=names[0], label="Model", visible=len(names) > 1)
    asked.quality = gr.Radio(
        label="Quality", info="speed-up of the DiT; IoU to the mesh of 100 dense steps", **settings["quality"]
    )
    asked.budget = gr.Slider(
        maximum=1, step=0.01, label="Budget", info="share of the dense model's FLOPs", **settings["budget"]
    )
    with gr.Row():
        asked.compare = gr.Checkbox(label="Dense beside it", **settings["compare"])
        asked.colours = gr.Checkbox(label="Image's colours")
    with gr.Row():
        asked.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        asked.samples = gr.Slider(1, 8, 1, step=1, label="Samples", min_width=140)
        asked.ensemble = gr.Slider(
            1, 8, 1, step=1, label="Ensemble", info="generations whose mean shape is the mesh", min_width=140
        )
    with gr.Accordion("More", open=False):
        asked.steps = gr.Slider(1, 100, step=1, label="Steps", **settings["steps"])
        asked.resolution = gr.Slider(
            maximum=512, step=8, label="Resolution (grid cells a side)", **settings["resolution"]
        )
        asked.faces = gr.Number(40_000, label="Most faces", precision=0, minimum=100)
    with gr.Row():
        asked.run = gr.Button("Make mesh", variant="primary")
        asked.stop = gr.Button("Stop", min_width=80, scale=0)
    asked.said = gr.HTML(min_height=60, elem_id="said")
    return asked


def _answer() -> SimpleNamespace:
    """The right column: what was made, by name."""
    answer = SimpleNamespace()
    answer.viewer = gr.HTML(
        "<p style='text-align: center; padding: 90px 0'>The mesh will be here.</p>", elem_id="viewer"
    )
    answer.gallery = gr.Gallery(
        label="Samples: choose one", columns=4, height="auto", allow_preview=False, object_fit="contain",
        visible=False, elem_id="gallery", buttons=[],
    )  # fmt: skip
    with gr.Row(equal_height=True):
        answer.kind = gr.Radio(["glb", "stl", "obj", "ply"], value="glb", label="Format", min_width=220)
        answer.up = gr.Radio([("Y", "y"), ("Z", "z")], value="y", label="Up", min_width=110)
        answer.size = gr.Number(100, label="Longest side, mm", minimum=0.001, maximum=1e6, min_width=130)
    answer.download = gr.DownloadButton("Download", interactive=False, variant="primary")
    answer.table = gr.HTML(elem_id="table")
    answer.routes = gr.Image(
        label="Blocks (rows) over steps: blue executed, orange reused, grey skipped", visible=False,
        interactive=False, height=420, elem_id="routes", buttons=["fullscreen"],
    )  # fmt: skip
    return answer


async def _download(url: str, cache_dir: str) -> str:
    """In the place of Gradio's own, which fetches whatever a visitor names where a file belongs, of any size."""
    raise failed("An address is given for a file, expected an upload.")


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Serve the page with fonts of the visitor's machine; returns what Gradio's `launch` does."""
    processing_utils.async_ssrf_protected_download = _download
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    queue = app.queue(max_size=64, default_concurrency_limit=VISITORS)
    return queue.launch(theme=theme, css=CSS, share=False, footer_links=[], **options)


def _drawn(draw: Draw, prompt: str, seed: float | None) -> Image.Image:
    try:
        image, warning = draw(prompt, int(seed or 0))
    except UserError as error:
        raise failed(error) from error
    if warning:
        gr.Warning(html.escape(warning))
    return image
