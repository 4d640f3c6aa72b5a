"""Tiny prepared shards of spheres, whose distances are known in closed form; a cache of their latents, and a model.

What takes long is made once; each test gets a copy.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.models.image_encoder import build_image_encoder
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.training import calibration
from elastic3d.training.latents import LatentInfo, build_cache
from elastic3d.training.options import StageName
from elastic3d.utils.files import load_json, save_json
from tests.training.tiny import add_views, dit_config, tiny_vae

COUNT = 512


def sphere(radius: float, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Stored tensors of a sphere at the origin."""
    normals = rng.standard_normal((COUNT, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    near = normals * radius + 0.02 * rng.standard_normal((COUNT, 3))
    volume = rng.uniform(-1.01, 1.01, (COUNT, 3))

    def distances(points: np.ndarray) -> np.ndarray:
        return np.concatenate([points, radius - np.linalg.norm(points, axis=1, keepdims=True)], axis=1)

    arrays = {
        "surface": np.concatenate([normals * radius, normals], axis=1),
        "sharp": np.zeros((0, 6)),
        "near": distances(near),
        "volume": distances(volume),
    }
    return {name: torch.from_numpy(array).half() for name, array in arrays.items()}


def prepare(root: Path) -> None:
    """`prepared/balls` in two shards, and splits of which one shape is missing."""
    rng = np.random.default_rng(0)
    folder = root / "prepared" / "balls"
    folder.mkdir(parents=True)
    for shard, ids in enumerate((range(3), range(3, 6))):
        tensors = {
            f"ball{i}/{name}": tensor for i in ids for name, tensor in sphere(0.4 + 0.1 * i, rng).items()
        }
        save_file(tensors, folder / f"shard-{shard:05d}.safetensors")
    (root / "train.txt").write_text("".join(f"balls/ball{i}\n" for i in range(5)) + "balls/absent\n")
    (root / "val.txt").write_text("balls/ball5\n")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A data folder."""
    prepare(tmp_path)
    return tmp_path


@pytest.fixture
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration goes through all it does, but tries a few values of each curve where it would try dozens."""
    few = {
        "EARLY": (0.0, 3.0), "LATE": (2.0,), "DAMPING_TIMES": (0.0, 1.0), "DAMPING_STEPS": ((-0.5,), (0.2,)),
        "_BIAS_BUDGETS": (0.4, 0.8), "_DAMPING_BUDGETS": (0.5, 0.7), "POINTS": 6,
    }  # fmt: skip
    for name, values in few.items():
        monkeypatch.setattr(calibration, name, values)


@pytest.fixture(scope="session")
def cached_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with views, an untrained VAE and the cache made with it."""
    root = tmp_path_factory.mktemp("cached")
    prepare(root)
    add_views(root)
    torch.manual_seed(0)
    ShapeVAE(tiny_vae()).save_pretrained(root / "vae")
    build_cache(dit_config(root, stage=StageName.cache))
    return root


@pytest.fixture
def cached(cached_once: Path, tmp_path: Path) -> Path:
    """A copy of that folder, whose cache is of the VAE beside it."""
    shutil.copytree(cached_once, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "latents" / "settings.json"
    save_json({**load_json(settings), "vae": str(tmp_path / "vae")}, settings)
    return tmp_path


@pytest.fixture(scope="session")
def dense_once(cached_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That folder with a random dense pipeline."""
    root = shutil.copytree(cached_once, tmp_path_factory.mktemp("dense"), dirs_exist_ok=True)
    info = LatentInfo.load(root / "latents")
    torch.manual_seed(0)
    dit = ShapeDiT(
        DiTConfig(
            in_channels=7, condition_channels=768, width=32, heads=2, double_blocks=1, single_blocks=2,
            num_latents=8, condition_tokens=49,
        )
    )  # fmt: skip
    for name, parameter in dit.named_parameters():
        if "mod" in name or "adaLN" in name or "final" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    vae = ShapeVAE.from_pretrained(root / "vae")
    vae.set_latent_statistics(info.mean, info.std)
    encoder = build_image_encoder(info.encoder)
    pipeline = ImageTo3DPipeline(vae, dit, encoder, PipelineConfig(model="tiny", steps=3))
    pipeline.save_pretrained(root / "dense", torch.bfloat16)
    save_json({"data": info.record}, root / "dense" / "dit" / "training.json")  # as an export does
    return root


@pytest.fixture
def dense(dense_once: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    torch.manual_seed(0)
    return shutil.copytree(dense_once, tmp_path, dirs_exist_ok=True)
