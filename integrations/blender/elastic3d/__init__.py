"""Blender add-on (4.2 and later): a panel that makes a mesh of an image with a local elastic3d server."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import bpy

from .client import Generation

INTERVAL_S = 0.2


class Elastic3DSettings(bpy.types.PropertyGroup):
    """What the panel shows, kept with the scene."""

    server: bpy.props.StringProperty(name="Server", default="http://127.0.0.1:8000")  # type: ignore[valid-type]
    token: bpy.props.StringProperty(name="Token", subtype="PASSWORD")  # type: ignore[valid-type]
    image: bpy.props.StringProperty(name="Image", subtype="FILE_PATH")  # type: ignore[valid-type]
    seed: bpy.props.IntProperty(name="Seed", default=0, min=0)  # type: ignore[valid-type]
    quality: bpy.props.EnumProperty(  # type: ignore[valid-type]
        name="Quality",
        items=[
            ("default", "Default", "The model's default"),
            ("fast", "Fast", "The model's fastest setting"),
            ("best", "Best", "The model's most faithful setting"),
            ("budget", "By budget", "What the budget pays for"),
        ],
    )
    budget: bpy.props.FloatProperty(  # type: ignore[valid-type]
        name="Budget",
        description="Share of the dense model's computation",
        default=0.4,
        min=0.01,
        max=1.0,
    )
    colours: bpy.props.BoolProperty(  # type: ignore[valid-type]
        name="Image's colours", description="Project the colours of the image onto the mesh"
    )
    resolution: bpy.props.IntProperty(  # type: ignore[valid-type]
        name="Resolution", description="0: that of the quality", default=0, min=0, max=512
    )
    ensemble: bpy.props.IntProperty(  # type: ignore[valid-type]
        name="Ensemble", description="Generations whose mean shape is the mesh", default=1, min=1, max=16
    )
    size: bpy.props.FloatProperty(  # type: ignore[valid-type]
        name="Longest side", default=1.0, min=1e-4, unit="LENGTH", description="Of the mesh in the scene"
    )


class ELASTIC3D_OT_generate(bpy.types.Operator):  # noqa: N801 (Blender's form)
    """Send the image to the server and put the mesh at the 3D cursor"""

    bl_idname = "elastic3d.generate"
    bl_label = "Make mesh"
    bl_options = {"REGISTER", "UNDO"}

    running: Generation | None = None  # of the class: no scene and no file keeps it
    _job: Generation | None = None
    _timer: Any = None

    @classmethod
    def poll(cls, context: Any) -> bool:
        """One at a time."""
        return cls.running is None or not cls.running.is_alive()

    def execute(self, context: Any) -> set[str]:
        """Without a window (scripts): wait for the mesh."""
        job = self._start(context)
        job.join()
        return self._finish(context, job)

    def invoke(self, context: Any, event: Any) -> set[str]:
        """From the panel: in the background."""
        self._job = type(self).running = self._start(context)
        self._timer = context.window_manager.event_timer_add(INTERVAL_S, window=context.window)
        context.window_manager.modal_handler_add(self)
        return {"RUNNING_MODAL"}

    def modal(self, context: Any, event: Any) -> set[str]:
        """Follow the job; Escape gives it up."""
        assert self._job is not None
        if event.type == "ESC":
            self._job.cancel()
            self._stop(context)
            return {"CANCELLED"}
        if event.type != "TIMER":
            return {"PASS_THROUGH"}
        if self._job.is_alive():
            for area in context.screen.areas:
                area.tag_redraw()
            return {"RUNNING_MODAL"}
        self._stop(context)
        return self._finish(context, self._job)

    def _start(self, context: Any) -> Generation:
        chosen = context.scene.elastic3d
        options: dict[str, Any] = {"seed": chosen.seed}
        if chosen.ensemble > 1:  # servers of before do not know it
            options["ensemble"] = chosen.ensemble
        if chosen.resolution:
            options["resolution"] = chosen.resolution
        if chosen.quality == "budget":
            options["budget"] = round(chosen.budget, 4)
        elif chosen.quality != "default":
            options["quality"] = chosen.quality
        if chosen.colours:
            options["texture"] = "project"
        job = Generation(chosen.server, chosen.token, Path(bpy.path.abspath(chosen.image)), options)
        job.start()
        return job

    def _stop(self, context: Any) -> None:
        context.window_manager.event_timer_remove(self._timer)
        type(self).running = None

    def _finish(self, context: Any, job: Generation) -> set[str]:
        if job.mesh is None:
            self.report({"ERROR"}, job.error or "cancelled")
            return {"CANCELLED"}
        place_mesh(context, job.mesh, Path(context.scene.elastic3d.image).stem or "mesh")
        return {"FINISHED"}


def place_mesh(context: Any, glb: bytes, name: str) -> Any:
    """Import a glb at the 3D cursor, its longest side as the scene's settings say; the new object."""
    before = set(bpy.data.objects)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mesh.glb"
        path.write_bytes(glb)
        bpy.ops.import_scene.gltf(filepath=str(path))
    added = [item for item in bpy.data.objects if item not in before]
    meshes = [item for item in added if item.type == "MESH"]
    context.view_layer.update()
    longest = max(max(item.dimensions) for item in meshes)
    for item in added:
        if item.parent is None:
            item.scale = [value * context.scene.elastic3d.size / longest for value in item.scale]
            item.location = context.scene.cursor.location
    meshes[0].name = name
    return meshes[0]


class ELASTIC3D_PT_panel(bpy.types.Panel):  # noqa: N801
    """In the sidebar of the 3D view."""

    bl_label = "elastic3d"
    bl_space_type, bl_region_type, bl_category = "VIEW_3D", "UI", "elastic3d"

    def draw(self, context: Any) -> None:
        """The settings and one button."""
        chosen, layout = context.scene.elastic3d, self.layout
        for name in (
            "image",
            "quality",
            "budget",
            "colours",
            "seed",
            "ensemble",
            "resolution",
            "size",
            "server",
            "token",
        ):
            if name != "budget" or chosen.quality == "budget":
                layout.prop(chosen, name)
        if (job := ELASTIC3D_OT_generate.running) is not None and job.is_alive():
            layout.progress(factor=job.progress, text="Esc cancels")
        layout.operator(ELASTIC3D_OT_generate.bl_idname)


CLASSES = (Elastic3DSettings, ELASTIC3D_OT_generate, ELASTIC3D_PT_panel)


def register() -> None:
    """Called by Blender when the add-on is switched on."""
    for part in CLASSES:
        bpy.utils.register_class(part)
    bpy.types.Scene.elastic3d = bpy.props.PointerProperty(type=Elastic3DSettings)


def unregister() -> None:
    """Called by Blender when the add-on is switched off."""
    del bpy.types.Scene.elastic3d
    for part in reversed(CLASSES):
        bpy.utils.unregister_class(part)
