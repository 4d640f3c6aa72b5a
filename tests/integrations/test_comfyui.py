"""The ComfyUI nodes: run as ComfyUI calls them, on a tiny pipeline, with its `folder_paths` stood in for."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from tiny_dial import save_dialled
from tiny_pipeline import image, tiny_pipeline

NODES = Path(__file__).parents[2] / "integrations" / "comfyui" / "elastic3d" / "__init__.py"


@pytest.fixture(scope="module")
def nodes():
    spec = importlib.util.spec_from_file_location("comfyui_elastic3d", NODES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_node_declares_what_its_function_takes(nodes) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        declared = node.INPUT_TYPES()
        names = {*declared["required"], *declared.get("optional", {})}
        function = getattr(node, node.FUNCTION)
        taken = set(function.__code__.co_varnames[1 : function.__code__.co_argcount])
        assert names == taken
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)


def test_from_an_image_batch_to_files(nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = np.asarray(image().convert("RGBA")).astype(np.float32) / 255
    batch = torch.from_numpy(np.stack([rgba[..., :3]] * 2))
    mask = torch.from_numpy(rgba[None, ..., 3])
    pipeline = tiny_pipeline()
    meshes, metadata = nodes.Elastic3DImageToMesh().generate(
        pipeline, batch, 5, "default", 0.0, 2, 16, 500, mask
    )
    assert len(meshes) == 2 and json.loads(metadata[0])["seed"] == 5
    alone = pipeline(image(), seed=5, steps=2, resolution=16, max_faces=500).mesh
    np.testing.assert_allclose(meshes[0].bounds, alone.bounds, atol=0.05)

    def get_save_image_path(prefix: str, folder: str):
        (Path(folder) / "elastic3d").mkdir(exist_ok=True)
        return str(Path(folder) / "elastic3d"), "mesh", 1, "elastic3d", prefix

    stand_in = types.SimpleNamespace(
        get_save_image_path=get_save_image_path, get_output_directory=lambda: str(tmp_path)
    )
    monkeypatch.setitem(sys.modules, "folder_paths", stand_in)
    save = nodes.Elastic3DSaveMesh().save
    first, second = (save(meshes[0], "elastic3d/mesh", "glb", metadata[0]) for _ in range(2))
    assert first["result"] != second["result"]
    assert len(trimesh.load_mesh(first["result"][0]).faces) == len(meshes[0].faces)
    assert first["ui"]["3d"][0]["subfolder"] == "elastic3d"
    (views,) = nodes.Elastic3DPreviewMesh().preview(meshes[0])
    assert views.shape == (1, 256, 1024, 3) and 0 <= views.min() < views.max() <= 1


def test_a_quality_is_a_point_of_the_dial(nodes, tmp_path: Path) -> None:
    """Within `torch.inference_mode`, in which ComfyUI runs its nodes."""
    model = str(save_dialled(tmp_path / "model"))
    batch = torch.from_numpy(np.asarray(image().convert("RGBA")).astype(np.float32)[None] / 255)
    generate = nodes.Elastic3DImageToMesh().generate
    with torch.inference_mode():
        (dialled,) = nodes.Elastic3DLoadModel().load(model, "cpu")
        made = [
            generate(dialled, batch, 0, *chosen, 0, 16, 500)[1][0]
            for chosen in (("fast", 0.0), ("default", 0.7))
        ]
    assert [json.loads(metadata)["dial"]["requested"] for metadata in made] == ["fast", 0.7]
    with pytest.raises(ValueError, match="expected one of them"):
        generate(dialled, batch, 0, "fast", 0.7, 0, 16, 500)


def test_masks_as_load_image_gives_them(nodes) -> None:
    """1 - alpha, and 64 x 64 zeros for an image without alpha."""
    rgba = np.asarray(image().convert("RGBA"))
    batch = torch.from_numpy(rgba[None, ..., :3] / np.float32(255))
    loaded = 1 - torch.from_numpy(rgba[None, ..., 3] / np.float32(255))
    (turned,) = nodes.to_images(batch, loaded, invert_mask=True)
    assert np.array_equal(np.asarray(turned), rgba)
    for invert in (False, True):
        (plain,) = nodes.to_images(batch, torch.zeros(1, 64, 64), invert)
        assert np.array_equal(np.asarray(plain), rgba[..., :3])
    (own,) = nodes.to_images(torch.from_numpy(rgba[None] / np.float32(255)), torch.zeros(1, 64, 64))
    assert np.array_equal(np.asarray(own), rgba), "alpha that the image has itself stays"


def test_a_mask_of_another_batch_is_named(nodes) -> None:
    with pytest.raises(ValueError, match="mask has 3 images, expected 1 or 2"):
        nodes.to_images(torch.zeros(2, 8, 8, 3), torch.zeros(3, 8, 8))
