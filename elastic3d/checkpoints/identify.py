"""Which published model a folder holds, for whoever named another one."""

from __future__ import annotations

import json
from pathlib import Path

from elastic3d.checkpoints.options import PRESETS

INDEX_NAME = "model_index.json"
PIPELINE_CLASSES = {"TripoSGPipeline": "triposg", "Step1X3DGeometryPipeline": "step1x3d"}


def identify(folder: Path) -> str:
    """`this is Hunyuan3D-2.1, say model=hunyuan3d2_1`, or nothing where the folder is of no known model."""
    if (folder / "pipeline.json").is_file():
        return f"this is a model folder of elastic3d, say model={folder}"
    for name, preset in PRESETS.items():
        if preset.subfolder and (folder / preset.subfolder).is_dir():
            return _say(name)
        if preset.subfolder and folder.name == preset.subfolder:
            return _say(name)
    if (folder / INDEX_NAME).is_file():
        return _say_pipeline(_class_name(folder / INDEX_NAME))
    config = folder / "config.yaml"
    if config.is_file():
        text = config.read_text(errors="replace")
        if "HunYuanDiTPlain" in text:
            return _say("hunyuan3d2_1")
        if "Hunyuan3DDiT" in text:
            return _say("hunyuan3d2")
    return ""


def _say(name: str) -> str:
    return f"this is {PRESETS[name].title}, say model={name}"


def _say_pipeline(found: str) -> str:
    if found in PIPELINE_CLASSES:
        return _say(PIPELINE_CLASSES[found])
    return f"this is {found.removesuffix('Pipeline')}, which elastic3d can't load" if found else ""


def _class_name(path: Path) -> str:
    try:
        return str(json.loads(path.read_text()).get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        return ""
