"""Run by Blender's Python (`bpy`): the add-on against a live server. Prints one JSON line."""

import json
import sys
from pathlib import Path

import bpy

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations" / "blender"))
import elastic3d as addon  # noqa: E402 (the add-on, not the library)

server, image = sys.argv[1:3]
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.preferences.addon_enable(module="io_scene_gltf2")
addon.register()
chosen = bpy.context.scene.elastic3d
chosen.server, chosen.image, chosen.resolution, chosen.size = server, image, 16, 2.5
bpy.context.scene.cursor.location = (1.0, 2.0, 3.0)
outcome = bpy.ops.elastic3d.generate()
made = next(item for item in bpy.data.objects if item.type == "MESH")
found = {
    "outcome": sorted(outcome),
    "faces": len(made.data.polygons),
    "longest": max(made.dimensions),
    "location": list(made.matrix_world.translation),
    "material": made.active_material.name,
    "name": made.name,
}
chosen.quality, chosen.colours = "fast", True
found["fast"] = sorted(bpy.ops.elastic3d.generate())
found["colours"] = len(bpy.context.selected_objects[0].data.color_attributes)
chosen.image = "nothing.png"
try:
    bpy.ops.elastic3d.generate()
except RuntimeError as error:
    found["error"] = str(error)
addon.unregister()
print("RESULT " + json.dumps(found))
