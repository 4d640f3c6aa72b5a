"""ComfyUI nodes: load a model, an image to a mesh with a dial for speed, save and preview the mesh.

Installation: `pip install` this repository into ComfyUI's Python, copy this folder to `ComfyUI/custom_nodes/elastic3d`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CATEGORY = "3d/elastic3d"
PREVIEW_VIEWS, PREVIEW_SIZE = 4, 256


class Elastic3DLoadModel:
    """A model folder, or the bundled model, as a pipeline on a device."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("ELASTIC3D",), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """What ComfyUI draws."""
        return {
            "required": {
                "model": ("STRING", {"default": "shape-small", "tooltip": "name or folder of the model"}),
                "device": (["auto", "cuda", "mps", "cpu"],),
            }
        }

    def load(self, model: str, device: str) -> tuple[Any]:
        """The pipeline."""
        from elastic3d import ImageTo3DPipeline

        return (ImageTo3DPipeline.from_pretrained(model, device=device),)


class Elastic3DImageToMesh:
    """Images (B,H,W,3 or 4) in [0,1], and masks (B,H,W) that are 1 on the object, or on the background as those of
    ComfyUI's LoadImage -> one mesh an image."""

    CATEGORY, FUNCTION = CATEGORY, "generate"
    RETURN_TYPES, RETURN_NAMES = ("TRIMESH", "STRING"), ("meshes", "metadata")
    OUTPUT_IS_LIST = (True, True)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What ComfyUI draws."""
        return {
            "required": {
                "model": ("ELASTIC3D",),
                "image": ("IMAGE",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
                "quality": (
                    ["default", "fast", "best"],
                    {"tooltip": "the model's own settings; needs budget 0"},
                ),
                "budget": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "instead of quality: share of the dense model's FLOPs",
                    },
                ),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the model's default"}),
                "resolution": (
                    "INT",
                    {"default": 0, "min": 0, "max": 512, "step": 8, "tooltip": "0: that of the quality"},
                ),
                "max_faces": ("INT", {"default": 40_000, "min": 100, "max": 1_000_000}),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {
                        "tooltip": "1 on the object, or the mask of Load Image with invert_mask; one of zeros says "
                        "nothing, and then the background has to be plain"
                    },
                ),
                "ensemble": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 64,
                        "tooltip": "generations whose mean shape is the mesh",
                    },
                ),
                "invert_mask": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "the mask is 1 on the background, as that of Load Image"},
                ),
            },
        }

    def generate(
        self,
        model: Any,
        image: torch.Tensor,
        seed: int,
        quality: str,
        budget: float,
        steps: int,
        resolution: int,
        max_faces: int,
        mask: torch.Tensor | None = None,
        ensemble: int = 1,
        invert_mask: bool = False,
    ) -> tuple[list[Any], list[str]]:
        """Meshes and how each was made, as JSON. ValueError if an image shows no object, or for a quality and a
        budget."""
        import json

        named = None if quality == "default" else quality
        chosen = {"quality": named, "budget": budget, "steps": steps, "resolution": resolution}
        options = {"max_faces": max_faces, "ensemble": ensemble} | {
            name: value for name, value in chosen.items() if value
        }
        results = model(to_images(image, mask, invert_mask), seed=seed, **options)
        return [result.mesh for result in results], [json.dumps(result.metadata) for result in results]


class Elastic3DSaveMesh:
    """Writes a mesh into ComfyUI's output folder."""

    CATEGORY, FUNCTION = CATEGORY, "save"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("path",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What ComfyUI draws."""
        return {
            "required": {
                "mesh": ("TRIMESH",),
                "filename_prefix": ("STRING", {"default": "elastic3d/mesh"}),
                "format": (["glb", "obj", "ply", "stl"],),
            },
            "optional": {"metadata": ("STRING", {"forceInput": True})},
        }

    def save(self, mesh: Any, filename_prefix: str, format: str, metadata: str = "{}") -> dict[str, Any]:
        """The file's path, numbered so that nothing is overwritten."""
        import json

        import folder_paths  # ComfyUI's own

        from elastic3d.geometry.mesh_io import save_mesh

        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = Path(folder) / f"{name}_{counter:05d}_.{format}"
        while path.exists():
            counter += 1
            path = path.with_name(f"{name}_{counter:05d}_.{format}")
        save_mesh(mesh, path, extras=json.loads(metadata), name=name)
        shown = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return {"ui": {"3d": [shown]}, "result": (str(path),)}


class Elastic3DPreviewMesh:
    """Views of a mesh from all round, as an image for ComfyUI's own preview."""

    CATEGORY, FUNCTION = CATEGORY, "preview"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("views",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What ComfyUI draws."""
        return {"required": {"mesh": ("TRIMESH",)}}

    def preview(self, mesh: Any) -> tuple[torch.Tensor]:
        """(1, H, W, 3) in [0, 1]."""
        from elastic3d.pipelines.preview import turntable

        strip = turntable(mesh, PREVIEW_VIEWS, PREVIEW_SIZE)
        return (torch.from_numpy(np.asarray(strip).astype(np.float32) / 255)[None],)


def to_images(image: torch.Tensor, mask: torch.Tensor | None, invert_mask: bool = False) -> list[Image.Image]:
    """ComfyUI's image batch (and mask) as PIL images. ValueError if their numbers differ.

    A mask of zeros, which LoadImage gives of an image without alpha, is none.
    """
    if mask is not None and len(mask) not in (1, len(image)):
        raise ValueError(f"mask has {len(mask)} images, expected 1 or {len(image)}")
    found = []
    for index, pixels in enumerate(image):
        array = (pixels.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)
        image = Image.fromarray(array)
        own = None if mask is None else mask[index % len(mask)].clamp(0, 1)
        if own is not None and own.any():
            values = (1 - own if invert_mask else own).cpu().numpy()
            alpha = Image.fromarray((values * 255).round().astype(np.uint8))
            image.putalpha(alpha.resize(image.size))
        found.append(image)
    return found


NODE_CLASS_MAPPINGS = {
    "Elastic3DLoadModel": Elastic3DLoadModel,
    "Elastic3DImageToMesh": Elastic3DImageToMesh,
    "Elastic3DSaveMesh": Elastic3DSaveMesh,
    "Elastic3DPreviewMesh": Elastic3DPreviewMesh,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Elastic3DLoadModel": "Load elastic3d model",
    "Elastic3DImageToMesh": "Image to mesh (elastic3d)",
    "Elastic3DSaveMesh": "Save mesh (elastic3d)",
    "Elastic3DPreviewMesh": "Preview mesh (elastic3d)",
}
