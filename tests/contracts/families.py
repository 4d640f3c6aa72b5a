"""Tiny models of every block family, and how a test drives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.benchmark.controls import TableRoutes
from elastic3d.elastic.context import Branch
from elastic3d.elastic.session import ElasticSession
from elastic3d.models.options import DiTConfig, SkipDiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.training.routes import FREE, Rollout

B, K = 4, 4  # rows of a batch; widths
CONDITIONAL = (Branch.conditional,)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass
class Family:
    """A tiny random model, its inputs, and how it is asked to checkpoint."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    checkpointing: Callable[[nn.Module], None]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        for parameter in model.parameters():  # no block may be the identity by its initialisation
            nn.init.normal_(parameter, std=0.15)
        return model


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def rows(inputs: dict[str, Any], index: list[int]) -> dict[str, Any]:
    taken = {k: v[index] if isinstance(v, Tensor) and v.shape[0] == B else v for k, v in inputs.items()}
    return {k: [v[i] for i in index] if isinstance(v, list) else v for k, v in taken.items()}


def _shape_dit() -> ShapeDiT:
    return ShapeDiT(
        DiTConfig(in_channels=4, condition_channels=6, width=32, heads=2, double_blocks=2, single_blocks=3)
    )


def _shape_inputs(batch: int) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "latents": torch.randn(batch, 10, 4),
        "t": torch.rand(batch),
        "condition": torch.randn(batch, 5, 6),
    }


def _skip_dit() -> SkipDiT:
    """Five blocks: the last two have a long skip, the very last one has experts."""
    return SkipDiT(
        SkipDiTConfig(
            in_channels=4, condition_channels=6, width=32, heads=2, blocks=5, expert_blocks=1, experts=3,
            condition_tokens=5,
        )
    )  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _flux_inputs(batch: int) -> dict[str, Any]:
    torch.manual_seed(1)
    places = torch.stack([torch.zeros(9), torch.arange(9) // 3, torch.arange(9) % 3], dim=-1)
    return {
        "hidden_states": torch.randn(batch, 9, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 6),
        "pooled_projections": torch.randn(batch, 6),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def _qwen(zero_cond_t: bool) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=6, axes_dims_rope=(4, 6, 6), zero_cond_t=zero_cond_t,
    )  # fmt: skip


def _qwen_inputs(batch: int, reference: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[1:2, 3:] = False  # a shorter prompt
    shapes = [(1, 2, 3), (1, 3, 1)] if reference else [(1, 3, 3)]
    return {
        "hidden_states": torch.randn(batch, 9, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 6),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(batch),
        "img_shapes": [shapes] * batch,
        "return_dict": False,
    }


def _checkpoint_diffusers(model: Any) -> None:
    model.enable_gradient_checkpointing()


FAMILIES = {
    "shape_dit": Family(
        _shape_dit, _shape_inputs, lambda model: setattr(model, "gradient_checkpointing", True)
    ),
    "skip_dit": Family(
        _skip_dit, _shape_inputs, lambda model: setattr(model, "gradient_checkpointing", True)
    ),
    "flux": Family(_flux, _flux_inputs, _checkpoint_diffusers),
    "qwen_image": Family(
        lambda: _qwen(False), lambda batch: _qwen_inputs(batch, False), _checkpoint_diffusers
    ),
    "qwen_image_edit": Family(
        lambda: _qwen(True), lambda batch: _qwen_inputs(batch, True), _checkpoint_diffusers
    ),
}


def begin(session: ElasticSession, samples: int = B, steps: int = 1) -> None:
    session.begin(samples, steps)


def forward(
    model: nn.Module, session: ElasticSession, inputs: dict[str, Any], step: int = 0, branches=CONDITIONAL
):
    session.step(step, 0.1, branches)
    with torch.no_grad():
        return run(model, inputs)


def train_forward(model: nn.Module, session: ElasticSession, inputs: dict[str, Any]) -> Tensor:
    n = len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    free = torch.full((n, 1, len(Branch), len(session.blocks)), FREE)
    session.source = Rollout(torch.linspace(0.3, 1, n), free, straight=True)
    session.begin(n, 1)
    session.step(0, 0.1, CONDITIONAL)
    return run(model, inputs)


def table(session: ElasticSession, action: int | Tensor, samples: int = B) -> TableRoutes:
    full = torch.zeros(1, 1, samples, len(session.blocks), dtype=torch.long)
    return TableRoutes(full + action, K)


def random_table(session: ElasticSession, seed: int, steps: int = 1, samples: int = B) -> TableRoutes:
    generator, widths = torch.Generator().manual_seed(seed), session.router_config.widths
    shape = (steps, 2, samples, len(session.blocks))
    return TableRoutes(torch.randint(0, widths + 1, shape, generator=generator), widths)


# -------------------------------------------------------------------------------------------- the dense model
