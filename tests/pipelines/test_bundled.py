"""The model that ships, as a user meets it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trimesh
from scipy.spatial import cKDTree

from elastic3d.elastic.config import Scope
from elastic3d.errors import UserError
from elastic3d.geometry.decode import decode_field
from elastic3d.geometry.options import BOX, DecodeConfig
from elastic3d.geometry.sampling import sample_surface
from elastic3d.geometry.surface import extract_surface
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.call import Result
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import DEFAULT_MODEL

ROOT = Path(__file__).resolve().parents[2]
TABLE, CHAIR = (ROOT / f"data/samples/{name}.png" for name in ("table", "chair"))


@pytest.fixture(scope="module")
def pipeline() -> ImageTo3DPipeline:
    return ImageTo3DPipeline.from_pretrained(ROOT / DEFAULT_MODEL)


@pytest.fixture(scope="module")
def dense(pipeline: ImageTo3DPipeline) -> Result:
    """A table by the dense model, in as many steps as it has by default."""
    return pipeline(TABLE, 0, resolution=16, elastic=False)


def test_the_bundled_model_makes_a_watertight_mesh_of_a_sample_image(pipeline: ImageTo3DPipeline) -> None:
    result = pipeline(TABLE, seed=0, steps=8, resolution=48)
    assert result.mesh.is_watertight
    width, height, _ = result.mesh.extents
    assert width > height, "the image shows a low table"
    assert result.metadata["flops_executed"] < 0.6 * result.metadata["flops_dense"], (
        "it is elastic by default"
    )


def test_the_bundled_routers_and_plan_keep_to_a_budget_and_to_the_dense_shape(
    pipeline: ImageTo3DPipeline, dense: Result
) -> None:
    assert dense.metadata["flops_executed"] == dense.metadata["flops_dense"] > 0
    tree = cKDTree(dense.mesh.vertices)
    for budget, steps, distance in ((0.4, 25, 0.03), (0.48, None, 0.01), (0.36, None, 0.02)):
        found = pipeline(TABLE, 0, budget=budget, steps=steps, resolution=16)
        share = found.metadata["flops_executed"] / found.metadata["flops_dense"]
        assert ("policy" in found.metadata) is (steps is None), (
            "routers run with steps, the dial's plan without"
        )
        assert abs(share - budget) < (0.1 if steps else 0.005), "one image: on average routers are closer"
        assert found.metadata["updated"] is False, "an NFE of 9 or more: without the LoRA"
        assert tree.query(found.mesh.vertices)[0].mean() < distance
    size = sum(file.stat().st_size for file in (ROOT / DEFAULT_MODEL / "routers").iterdir())
    assert size < 10e6


def test_bundled_routers_of_each_block_decide_for_each_image() -> None:
    pipeline = ImageTo3DPipeline.from_pretrained(ROOT / DEFAULT_MODEL, routers="per_block")
    assert pipeline.session is not None and pipeline.session.router_config.scope is Scope.block
    images = [TABLE, CHAIR]
    # two thirds of the dense evaluations are all that run with learned guidance
    whole, half = (pipeline(images, 0, resolution=16, steps=6, budget=budget) for budget in (1, 0.5))
    for full, found in zip(whole, half, strict=True):
        share = found.metadata["flops_executed"] / found.metadata["flops_dense"]
        assert full.metadata["flops_executed"] / full.metadata["flops_dense"] == pytest.approx(
            2 / 3, abs=0.01
        )
        assert abs(share - 0.5) < 0.06
        actions = str(found.metadata["routes"]["actions"])
        assert len({*actions} & {*"0.-123"}) > 1, "blocks of a step go different ways"
        assert cKDTree(full.mesh.vertices).query(found.mesh.vertices)[0].mean() < 0.04
    assert len({str(found.metadata["routes"]["actions"]) for found in half}) > 1
    with pytest.raises(UserError, match="steps is 25, expected 4 to 6, for which these per-block routers"):
        pipeline(images[0])
    with pytest.raises(UserError, match=r"budget is 0.4, expected 0.45 to 1, .* calibrated in 6 steps"):
        pipeline(images[0], steps=6, budget=0.4)
    found = [pipeline(images[0], steps=steps, resolution=8).metadata["budget"] for steps in (4, 5, 6)]
    assert found == pytest.approx([0.42, 0.47, 0.45], abs=0.005)  # the smallest, where the default is below


def test_the_bundled_lora_brings_a_small_nfe_nearer_to_a_large_one(
    pipeline: ImageTo3DPipeline, dense: Result
) -> None:
    def made(uses: bool | None, **options: object) -> torch.Tensor:
        result = pipeline(TABLE, 0, resolution=8, **options)
        assert result.metadata.get("updated") == uses and result.latents is not None
        return result.latents

    many = dense.latents
    assert dense.metadata.get("updated") is None and many is not None
    plain, adapted = made(False, steps=4, budget=1.0, few_step=False), made(True, steps=4, budget=1.0)
    assert torch.equal(made(None, steps=4, elastic=False), plain)
    errors = [(found - many).square().mean() / many.square().mean() for found in (plain, adapted)]
    assert errors[1] < 0.9 * errors[0]  # 0.46


def table() -> trimesh.Trimesh:
    """A top and four legs, both thinner than a cell of a grid of 32."""
    top = trimesh.creation.box((1.9, 0.06, 1.3), trimesh.transformations.translation_matrix((0, 0.5, 0)))
    legs = [
        trimesh.creation.box((0.06, 1.0, 0.06), trimesh.transformations.translation_matrix((x, -0.03, z)))
        for x in (-0.9, 0.9)
        for z in (-0.6, 0.6)
    ]
    mesh = trimesh.util.concatenate([top, *legs])
    assert isinstance(mesh, trimesh.Trimesh)
    return mesh


@pytest.mark.parametrize(
    "shape",
    [table(), pytest.param(trimesh.creation.torus(0.7, 0.2), marks=pytest.mark.slow)],
    ids=["table", "torus"],
)
@torch.no_grad()
def test_the_trained_field_is_decoded_as_on_the_full_grid(shape: trimesh.Trimesh) -> None:
    vae = ShapeVAE.from_pretrained(ROOT / DEFAULT_MODEL / "vae").float().eval()
    surface = torch.cat([torch.from_numpy(part) for part in sample_surface(shape, 2048, seed=0)], dim=-1)
    tokens = vae.decode(vae.to_latents(vae.encode(surface[None]).mean))
    resolution, voxel = 48, 2 * BOX / 48
    meshes, queries = [], []
    for coarse in (resolution // 2, resolution):  # with one level, the coarse grid is the full one
        config = DecodeConfig(resolution=resolution, coarse_resolution=coarse, max_points=8192)
        values, stats = decode_field(lambda points: vae.query(points[None], tokens)[0], config)
        meshes.append(extract_surface(values))
        queries.append(stats.queries)
    fine, full = (cKDTree(mesh.vertices) for mesh in meshes)
    assert fine.query(full.data)[0].mean() + full.query(fine.data)[0].mean() < 0.1 * voxel
    assert 3 * queries[0] < queries[1] == (resolution + 1) ** 3
    assert abs(meshes[0].bounds[0, 1] - shape.bounds[0, 1]) < 2 * voxel, "the legs are there"


def test_the_bundled_models_stay_small() -> None:
    files = [path for path in (ROOT / "data/pretrained").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 120e6, "every clone has them"


def test_a_first_mesh_waits_for_no_compiler_and_no_other_library():
    """Each of these takes a second or more to import, and nothing on the default path needs it."""
    code = (
        "import sys; from elastic3d import ImageTo3DPipeline;"
        "pipeline = ImageTo3DPipeline.from_pretrained('shape-small', device='cpu');"
        f"pipeline({str(ROOT / 'data/samples/chair.png')!r}, resolution=32);"
        "heavy = ('torch._dynamo', 'sympy', 'diffusers', 'transformers', 'accelerate', 'open3d', 'matplotlib');"
        "sys.exit(', '.join(name for name in heavy if name in sys.modules) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
