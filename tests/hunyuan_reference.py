"""What the original program (PyPI package hy3dgen 2.0.2) computes with the tiny checkpoints of `hunyuan_tiny`.

    python tests/hunyuan_reference.py      # where hy3dgen is importable: writes the stored numbers anew

hy3dgen is under a non-commercial licence: it is no dependency of this project, and nothing of it is in here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from hunyuan_tiny import CASES, CHANNELS, CONTEXT, IMAGE, LATENTS, dinov2_shapes, tiny_config, tiny_state
from safetensors.torch import save_file
from torch import Tensor, nn

STORED = Path(__file__).parent / "checkpoints" / "data" / "hunyuan3d_reference.safetensors"
STEPS, GUIDANCE, VIEWS = 5, 5.0, (0, 2)


def available() -> bool:
    """Whether hy3dgen can be imported."""
    return importlib.util.find_spec("hy3dgen") is not None


def inputs(case: str) -> dict[str, Tensor]:
    """The same random inputs for both programs; images (1,V,3,S,S) in [0,1]."""
    generator = torch.Generator().manual_seed(11)
    views = len(VIEWS) if case == "mv" else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "latents": normal(2, LATENTS, CHANNELS),
        "t": torch.tensor([0.25, 0.7]),
        "condition": normal(2, 5 * views, CONTEXT),
        "guidance": torch.tensor([5.0, 3.0]),
        "points": torch.rand((2, 50, 3), generator=generator) * 2 - 1,
        "images": torch.rand((1, views, 3, IMAGE, IMAGE), generator=generator),
    }


def reference(case: str) -> dict[str, Tensor]:
    """Velocity, field, condition tokens and sampled latents of the original program."""
    _import_hy3dgen()
    config = tiny_config(case)
    state = tiny_state(config)
    parts = {name: _instance(config[name]) for name in ("model", "vae", "scheduler", "conditioner")}
    parts["model"].load_state_dict(_without(state, "model."))
    parts["vae"].load_state_dict(_without(state, "vae."))
    network = _installed_names(_without(state, "conditioner.main_image_encoder.model."))
    parts["conditioner"].main_image_encoder.model.load_state_dict(network)
    given = inputs(case)
    options = {"guidance": given["guidance"]} if case == "turbo" else {}
    more = {"view_idxs": [VIEWS]} if case == "mv" else {}
    images = given["images"] if case == "mv" else given["images"][:, 0]
    vae = parts["vae"]
    with torch.no_grad():
        tokens = vae(given["latents"] / vae.scale_factor)
        field = vae.geo_decoder(queries=given["points"], latents=tokens)
        velocity = parts["model"](given["latents"], given["t"], {"main": given["condition"]}, **options)
        condition = parts["conditioner"](image=images * 2 - 1, **more)["main"]
    pipelines = importlib.import_module("hy3dgen.shapegen.pipelines")
    prepared = {
        "image": images * 2 - 1,
        "mask": images[..., :1, :, :],
        **({"view_idxs": VIEWS} if more else {}),
    }
    pipeline = pipelines.Hunyuan3DDiTFlowMatchingPipeline(
        image_processor=lambda _: dict(prepared), device="cpu", dtype=torch.float32, **parts
    )
    sampled = pipeline(
        image=None, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", enable_pbar=False,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    return {"velocity": velocity, "field": field.squeeze(-1), "condition": condition, "sampled": sampled}


def _without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _installed_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's tensors by the names of the installed transformers, in the order of both lists of names."""
    from hunyuan_tiny import DINOV2

    new: dict[str, Tensor] = {}
    wanted = dinov2_shapes(DINOV2, old_names=False)
    for name in wanted:
        old = name
        for ours, theirs in (
            ("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"),
            ("o_proj", "output.dense"), ("down_proj", "weights_out"),
        ):  # fmt: skip
            old = old.replace(ours, theirs)
        if "gate_proj" in name or "up_proj" in name:
            both = state[name.replace("gate_proj", "weights_in").replace("up_proj", "weights_in")]
            half = len(both) // 2
            new[name] = both[:half] if "gate_proj" in name else both[half:]
        else:
            new[name] = state[old]
    return new


def _instance(part: dict[str, Any]) -> Any:
    module, _, name = part["target"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    made = kind(**part["params"])
    return made.eval() if isinstance(made, nn.Module) else made


def _import_hy3dgen() -> None:
    """Make its modules importable one by one: its packages' own __init__ want renderers and mesh libraries."""
    if "hy3dgen" in sys.modules:
        return
    spec = importlib.util.find_spec("hy3dgen")
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in ("hy3dgen", "hy3dgen.shapegen"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.parent.joinpath(*name.split(".")))]
        sys.modules[name] = package
    missing = importlib.util.find_spec("torchvision") is None
    if missing:
        from transformers import CLIPVisionModelWithProjection, Dinov2Model  # noqa: F401  # they look for it first

        sys.modules["torchvision"] = types.ModuleType("torchvision")
        sys.modules["torchvision"].transforms = _transforms()  # type: ignore[attr-defined]
    importlib.import_module("hy3dgen.shapegen.models.conditioner")
    if missing:
        del sys.modules["torchvision"]


def _transforms() -> types.ModuleType:
    """The three transforms that its image encoder takes from torchvision, on tensors."""
    module = types.ModuleType("torchvision.transforms")

    def resize(size: int, mode: str, antialias: bool) -> Any:
        def apply(x: Tensor) -> Tensor:
            return nn.functional.interpolate(x, size=(size, size), mode=mode, antialias=antialias)

        return apply

    def normalize(mean: list[float], std: list[float]) -> Any:
        return lambda x: (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    def compose(steps: list[Any]) -> Any:
        def apply(x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        return apply

    vars(module).update(
        Compose=compose,
        Resize=resize,
        Normalize=normalize,
        CenterCrop=lambda size: lambda x: x,  # the images are squares of that size by then
        InterpolationMode=types.SimpleNamespace(BILINEAR="bilinear"),
    )
    return module


if __name__ == "__main__":
    STORED.parent.mkdir(exist_ok=True)
    found = {
        f"{case}.{name}": value.contiguous() for case in CASES for name, value in reference(case).items()
    }
    save_file(found, STORED)
    print(f"{STORED}: {len(found)} tensors")
