"""Metrics of images, and of rendered views: how alike two meshes look from a fixed set of cameras.

Images are (H, W), H = W = size pixels. Normals are those of the faces, not smoothed ones, so a
score depends on the surface and not on how a file shades it. In every formula the background is the zero
normal.

Sources: SSIM as in Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
Similarity"; 22 views and the sharp normal error (SNE) as in Chen et al. 2025, "Dora: Sampling and
Benchmarking for 3D Shape Variational Auto-Encoders", with edges found by the angle between normals; LPIPS as
in Zhang et al. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import structural_similarity

from elastic3d.errors import UserError
from elastic3d.geometry.render import Camera, Scene, Views, ring_cameras

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.floating]
Perceptual = Callable[[Floats, Floats], float]  # two images (H, W, 3) in [0, 1] to a distance

# Rings of cameras by number of views: (count, elevation in degrees) each, the first camera of a ring in
# front.
RINGS: dict[int, tuple[tuple[int, float], ...]] = {
    4: ((4, 20.0),),
    8: ((8, 20.0),),
    22: ((10, 15.0), (6, 50.0), (6, -30.0)),
}
FOV_DEG = 40.0
DISTANCE = 5.1  # the sphere around the cube [-1, 1]^3 just fits into the image
EDGE_ANGLE_DEG = 30.0
EDGE_DILATION = 3  # pixels
PSNR_CAP = 100.0  # dB, for images that are equal
BACKBONE_FILE = "alexnet-owt-7be5be79.pth"


@dataclass(frozen=True)
class ViewScores:
    """Scores averaged over the views. `sharp_normal_error` is None where the ground truth shows no sharp edge."""

    silhouette_iou: float
    normal_psnr: float
    normal_ssim: float
    sharp_normal_error: float | None
    lpips: float | None = None


def fixed_cameras(count: int) -> list[Camera]:
    """The `count` cameras of the protocol. ValueError unless there is a ring of that many (4, 8 or 22)."""
    if count not in RINGS:
        raise ValueError(f"views is {count}, expected one of {', '.join(map(str, RINGS))}")
    return [
        camera
        for number, elevation in RINGS[count]
        for camera in ring_cameras(number, elevation, DISTANCE, FOV_DEG)
    ]


def compare_views(
    pred: trimesh.Trimesh | None,
    gt: trimesh.Trimesh,
    count: int,
    size: int = 256,
    perceptual: Perceptual | None = None,
) -> ViewScores:
    """Render both meshes, given in the ground truth's frame (longest side 2), and score the pairs of views.

    `pred` may be None: views of nothing, for a failed generation. `perceptual` is an image distance such as
    LPIPS, taken between the shaded views; left out if None.
    """
    pred_scene, gt_scene = Scene(pred, smooth=False) if pred else None, Scene(gt, smooth=False)
    silhouettes, errors, structure, distances = [], [], [], []
    edge_error, edge_pixels = 0.0, 0
    for camera in fixed_cameras(count):
        b = gt_scene.render(camera, size, shaded=perceptual is not None)
        a = pred_scene.render(camera, size, shaded=perceptual is not None) if pred_scene else empty_like(b)
        silhouettes.append(silhouette_iou(a, b))
        errors.append(np.square(normal_colours(a) - normal_colours(b)).mean(dtype=np.float64))
        structure.append(ssim(normal_colours(a), normal_colours(b)))
        edges = sharp_edges(b)
        edge_error += float(np.square(a.normal - b.normal)[edges].sum(dtype=np.float64)) / 3
        edge_pixels += int(edges.sum())
        if perceptual is not None:
            distances.append(perceptual(on_white(a), on_white(b)))
    return ViewScores(
        silhouette_iou=float(np.mean(silhouettes)),
        normal_psnr=psnr(float(np.mean(errors))),
        normal_ssim=float(np.mean(structure)),
        sharp_normal_error=edge_error / edge_pixels if edge_pixels else None,
        lpips=float(np.mean(distances)) if distances else None,
    )


def empty_like(view: Views) -> Views:
    """The view of nothing, of the same size."""
    return Views(
        silhouette=np.zeros_like(view.silhouette),
        depth=np.full_like(view.depth, np.inf),
        normal=np.zeros_like(view.normal),
        colour=np.zeros_like(view.colour),
    )


def silhouette_iou(pred: Views, gt: Views) -> float:
    """Intersection over union of the covered pixels; 1 where both views are empty."""
    union = np.count_nonzero(pred.silhouette | gt.silhouette)
    return np.count_nonzero(pred.silhouette & gt.silhouette) / union if union else 1.0


def normal_colours(view: Views) -> Floats:
    """The normal map as colours (H, W, 3) in [0, 1]: (n + 1) / 2, the background mid grey."""
    return (view.normal + 1) / 2


def on_white(view: Views) -> Floats:
    """The shaded view (H, W, 3) in [0, 1] on white."""
    colour = view.colour.astype(np.float32) / 255
    return colour[..., :3] * colour[..., 3:] + 1 - colour[..., 3:]


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]: -10 log10(MSE), at most `PSNR_CAP`."""
    return min(PSNR_CAP, -10 * float(np.log10(max(mean_squared_error, 1e-300))))


def ssim(a: Floats, b: Floats) -> float:
    """Structural similarity of two images (H, W, C) in [0, 1]: Gaussian window of sigma 1.5, 11 pixels wide.

    Averaged over channels and the pixels whose window fits. ValueError where none does, or the sizes differ.
    """
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[:2]) < 11:
        raise ValueError(
            f"images have shapes {a.shape} and {b.shape}, expected one (H, W, C) of 11 pixels or more"
        )
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return float(structural_similarity(a.astype(float), b.astype(float), channel_axis=-1, **options))


def sharp_edges(view: Views) -> NDArray[np.bool_]:
    """Mask (H, W): pixels within `EDGE_DILATION` of two surface neighbours whose normals differ by a sharp angle."""
    mask = np.zeros_like(view.silhouette)
    for normal, surface, marked in (
        (view.normal, view.silhouette, mask),
        (view.normal.swapaxes(0, 1), view.silhouette.T, mask.T),  # between columns; the mask is a view
    ):
        cosine = np.einsum("hwk,hwk->hw", normal[1:], normal[:-1])
        sharp = (cosine < np.cos(np.radians(EDGE_ANGLE_DEG))) & surface[1:] & surface[:-1]
        marked[1:] |= sharp
        marked[:-1] |= sharp
    side = 2 * EDGE_DILATION + 1
    return ndimage.binary_dilation(mask, np.ones((side, side), bool))


def feature_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """How differently a network sees images, distances (P,) by its feature maps (P,C,h,w), a map for each scale: LPIPS
    without weights that were fitted to people's judgements.

    At every position the features become a vector of length one; the squared distance of the two vectors is averaged
    over positions, then over scales (Zhang et al. 2018, equation 1, all weights 1). 0 for equal images.

    Raises:
        ValueError: not the same maps on both sides, or none.
    """
    import torch

    shapes = [[tuple(each.shape) for each in maps] for maps in (first, second)]
    if shapes[0] != shapes[1] or not first:
        raise ValueError(f"maps have shapes {shapes[0]} and {shapes[1]}, expected the same, and at least one")
    scales = []
    for a, b in zip(first, second, strict=True):
        a, b = (torch.nn.functional.normalize(each.float(), dim=1) for each in (a, b))
        scales.append((a - b).square().sum(dim=1).mean(dim=(1, 2)))
    return torch.stack(scales).mean(dim=0)


@cache
def load_lpips() -> Perceptual:
    """The AlexNet variant of LPIPS, version 0.1, as a distance of two images (H, W, 3) in [0, 1].

    The `lpips` package would download the weights of its backbone on first use; this never lets it, so that a run
    without network either has the metric or says what is missing.

    Raises:
        UserError: the `lpips` package or the backbone's weights are not installed.
    """
    import torch

    try:
        import lpips
    except ImportError as error:
        raise UserError("lpips=true needs the lpips package: pip install lpips torchvision") from error
    weights = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_FILE
    if not weights.is_file():
        raise UserError(f"lpips=true needs torchvision's AlexNet weights at {weights}, which is no file")
    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def distance(first: Floats, second: Floats) -> float:
        images = [
            torch.from_numpy(np.moveaxis(i, -1, 0).copy()).float()[None] * 2 - 1 for i in (first, second)
        ]
        with torch.inference_mode():
            return float(network(*images))

    return distance
