"""The DiT of Hunyuan3D-2.1 against the same arithmetic written out head by head and token by token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hunyuan_tiny import CHANNELS, CONTEXT, LATENTS, config_21, dit_shapes_21, tiny_state, write_checkpoint_21
from torch import Tensor

from elastic3d.benchmark.controls import TableRoutes
from elastic3d.checkpoints.hunyuan3d import load_hunyuan3d
from elastic3d.elastic import attach
from elastic3d.models.skip_dit import SkipDiT

PARAMS = config_21()["model"]["params"]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_21(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def dit(root: Path) -> SkipDiT:
    found = load_hunyuan3d(root, "hunyuan3d-dit-v2-1").dit
    assert isinstance(found, SkipDiT)
    return found


@pytest.fixture(scope="module")
def weights() -> Weights:
    return {name.removeprefix("model."): tensor for name, tensor in tiny_state(config_21(), 1).items()}


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, LATENTS, CHANNELS, generator=generator)
    return (
        latents,
        torch.rand(batch, generator=generator),
        torch.randn(batch, 5, CONTEXT, generator=generator),
    )


# ------------------------------------------------------------------------------------------------------- the oracle


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return unit * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]


def attention(w: Weights, name: str, x: Tensor, data: Tensor) -> Tensor:
    """One sample: the projections side by side, cut into heads, and each head's piece into q, k, v."""
    heads, to_itself = PARAMS["num_heads"], data is x
    q, k, v = (linear(w, f"{name}.to_{each}", y) for each, y in (("q", x), ("k", data), ("v", data)))
    width = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        if to_itself:
            piece = torch.cat([q, k, v], -1)[:, 3 * width * head : 3 * width * (head + 1)]
            mine, keys, values = piece[:, :width], piece[:, width : 2 * width], piece[:, 2 * width :]
        else:
            piece = torch.cat([k, v], -1)[:, 2 * width * head : 2 * width * (head + 1)]
            mine, keys, values = q[:, width * head : width * (head + 1)], piece[:, :width], piece[:, width:]
        mine, keys = rms_norm(w, f"{name}.q_norm", mine), rms_norm(w, f"{name}.k_norm", keys)
        outputs.append((mine @ keys.T / math.sqrt(width)).softmax(-1) @ values)
    return linear(w, f"{name}.out_proj", torch.cat(outputs, -1))


def feed_forward(w: Weights, first: str, second: str, x: Tensor) -> Tensor:
    hidden = linear(w, first, x)
    return linear(w, second, hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def experts(w: Weights, name: str, x: Tensor) -> Tensor:
    """Token by token: the shared expert, and the best ones weighted by their share among all."""
    rows = []
    for token in x:
        y = feed_forward(w, f"{name}.shared_experts.net.0.proj", f"{name}.shared_experts.net.2", token)
        shares = (w[f"{name}.gate.weight"] @ token).softmax(0)
        for expert in shares.argsort(descending=True)[: PARAMS["moe_top_k"]].tolist():
            part = f"{name}.experts.{expert}.net"
            y = y + shares[expert] * feed_forward(w, f"{part}.0.proj", f"{part}.2", token)
        rows.append(y)
    return torch.stack(rows)


def join(w: Weights, block: str, x: Tensor, skip: Tensor) -> Tensor:
    return layer_norm(w, f"{block}.skip_norm", linear(w, f"{block}.skip_linear", torch.cat([skip, x], -1)))


def oracle(
    w: Weights, latents: Tensor, t: Tensor, condition: Tensor, left_out: tuple[int, ...] = ()
) -> Tensor:
    """Velocity of one sample; blocks `left_out` pass on what they get, the long skip included."""
    D, depth = PARAMS["hidden_size"], PARAMS["depth"]
    frequencies = torch.tensor([10000 ** (-i / (D // 2)) for i in range(D // 2)])
    time = torch.cat([(t * frequencies).sin(), (t * frequencies).cos()])
    token = feed_forward(w, "t_embedder.mlp.0", "t_embedder.mlp.2", time)
    x = torch.cat([token[None], linear(w, "x_embedder", latents)])
    kept: dict[int, Tensor] = {}
    for i in range(depth):
        block = f"blocks.{i}"
        if i > depth // 2:
            x = join(w, block, x, kept[depth - 1 - i])
        if i not in left_out:
            normal = layer_norm(w, f"{block}.norm1", x)
            x = x + attention(w, f"{block}.attn1", normal, normal)
            x = x + attention(w, f"{block}.attn2", layer_norm(w, f"{block}.norm2", x), condition)
            normal = layer_norm(w, f"{block}.norm3", x)
            if i >= depth - PARAMS["num_moe_layers"]:
                x = x + experts(w, f"{block}.moe", normal)
            else:
                x = x + feed_forward(w, f"{block}.mlp.fc1", f"{block}.mlp.fc2", normal)
        kept[i] = x
    return linear(w, "final_layer.linear", layer_norm(w, "final_layer.norm_final", x)[1:])


# -------------------------------------------------------------------------------------------------------- the tests


def test_every_tensor_is_loaded(dit: SkipDiT) -> None:
    assert {name: tuple(value.shape) for name, value in dit.state_dict().items()} == dit_shapes_21(PARAMS)


def test_against_the_oracle(dit: SkipDiT, weights: Weights) -> None:
    latents, t, condition = inputs()
    with torch.no_grad():
        found = dit(latents, t, condition)
    wanted = torch.stack([oracle(weights, *row) for row in zip(latents, t, condition, strict=True)])
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-4


def test_the_whole_sampling(root: Path, weights: Weights) -> None:
    """Five steps with guidance, the loop written out with the oracle."""
    from elastic3d.diffusion.sampler import sample, sampling_times

    bundle = load_hunyuan3d(root, "hunyuan3d-dit-v2-1")
    condition = inputs(1)[2]
    times = sampling_times(bundle.config.pipeline, 5)
    generator = [torch.Generator().manual_seed(3)]
    found = sample(bundle.dit, condition, (LATENTS, CHANNELS), times, 5.0, generator)
    x = torch.randn(LATENTS, CHANNELS, generator=torch.Generator().manual_seed(3))
    for now, after in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        t = torch.tensor(now)
        conditional, free = (
            oracle(weights, x, t, condition[0]),
            oracle(weights, x, t, torch.zeros_like(condition[0])),
        )
        x = x + (after - now) * (free + 5.0 * (conditional - free))
    assert (found[0] - x).abs().max() / x.abs().max() < 1e-4


@pytest.mark.parametrize("left_out", [(1,), (3,), (4,), (0, 2, 3), (0, 1, 2, 3, 4)])
def test_a_block_that_is_left_out_keeps_its_long_skip(
    root: Path, weights: Weights, left_out: tuple[int, ...]
) -> None:
    dit = load_hunyuan3d(root, "hunyuan3d-dit-v2-1").dit
    latents, t, condition = inputs(1)
    session = attach(dit)
    widths = len(session.router_config.ratios)
    actions = torch.full((1, 1, 1, 5), widths)
    actions[..., list(left_out)] = 0
    session.source = TableRoutes(actions, widths)
    session.begin(1, 1)
    session.step(0, 1.0, (0,))
    with torch.no_grad():
        found = dit(latents, t, condition)
    wanted = oracle(weights, latents[0], t[0], condition[0], left_out)
    assert (found[0] - wanted).abs().max() / wanted.abs().max() < 1e-4


def test_gradient_checkpointing(dit: SkipDiT) -> None:
    gradients = []
    for checkpointing in (False, True):
        dit.gradient_checkpointing = checkpointing
        dit.zero_grad()
        dit(*inputs()).square().mean().backward()
        gradients.append([p.grad.clone() for p in dit.parameters() if p.grad is not None])
    dit.gradient_checkpointing = False
    assert len(gradients[0]) == len(list(dit.parameters()))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_no_guidance_scale(dit: SkipDiT) -> None:
    with pytest.raises(ValueError, match="takes no guidance"):
        dit(*inputs(), torch.ones(2))


def test_half_precision(root: Path) -> None:
    bundle = load_hunyuan3d(root, "hunyuan3d-dit-v2-1", dtype=torch.bfloat16)
    with torch.no_grad():
        velocity = bundle.dit(*inputs())
    assert velocity.dtype == torch.bfloat16 and velocity.isfinite().all()
