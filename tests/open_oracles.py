"""TripoSG's and Step1X-3D's arithmetic by their published names, written out a second time; nothing of the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(p: State, name: str, x: Tensor) -> Tensor:
    out = x @ p[f"{name}.weight"].T
    return out + p[f"{name}.bias"] if f"{name}.bias" in p else out


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def norm(p: State, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def rms(p: State, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Lists of heads side by side: q (B,L,H,d), k, v (B,M,H,d) -> (B,L,H*d), head after head."""
    heads = []
    for h in range(q.shape[2]):
        weights = (q[:, :, h] @ k[:, :, h].transpose(1, 2) / math.sqrt(q.shape[3])).softmax(-1)
        heads.append(weights @ v[:, :, h])
    return torch.cat(heads, dim=-1)


def time_features(scaled: Tensor, width: int) -> Tensor:
    half = width // 2
    rows = [[s * 10000 ** (-i / half) for i in range(half)] for s in scaled.double().tolist()]
    angles = torch.tensor(rows, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def point_features(points: Tensor) -> Tensor:
    sines = [(points[..., a] * 2.0**f).sin() for a in range(3) for f in range(8)]
    cosines = [(points[..., a] * 2.0**f).cos() for a in range(3) for f in range(8)]
    return torch.cat([points, torch.stack(sines, -1), torch.stack(cosines, -1)], dim=-1)


def farthest(points: Tensor, count: int) -> list[int]:
    chosen = [0]
    while len(chosen) < count:
        nearest = [min((p - points[i]).square().sum().item() for i in chosen) for p in points]
        chosen.append(max(range(len(points)), key=nearest.__getitem__))
    return chosen


# ---------------------------------------------------------------------------------------------------------- TripoSG


def _triposg_attention(p: State, name: str, x: Tensor, data: Tensor, H: int, self_: bool) -> Tensor:
    q, k, v = linear(p, f"{name}.to_q", x), linear(p, f"{name}.to_k", data), linear(p, f"{name}.to_v", data)
    B, L, W = q.shape
    if self_:
        q, k, v = torch.cat([q, k, v], -1).view(B, L, H, 3 * W // H).split(W // H, dim=-1)
    else:
        k, v = torch.cat([k, v], -1).view(B, data.shape[1], H, 2 * W // H).split(W // H, dim=-1)
        q = q.view(B, L, H, W // H)
    if f"{name}.norm_q.weight" in p:
        q, k = rms(p, f"{name}.norm_q", q), rms(p, f"{name}.norm_k", k)
    return linear(p, f"{name}.to_out.0", attention(q, k, v))


def _feed_forward(p: State, name: str, x: Tensor) -> Tensor:
    return linear(p, f"{name}.net.2", gelu(linear(p, f"{name}.net.0.proj", x)))


def triposg_output(
    p: State, heads: int, layers: int, x: Tensor, timestep: Tensor, condition: Tensor
) -> Tensor:
    """The network's own output at its own time 0 .. 1000 (1000 is noise)."""
    W = p["proj_in.weight"].shape[0]
    time = time_features(timestep, W).to(x)
    time = linear(p, "time_proj.linear_2", gelu(linear(p, "time_proj.linear_1", time)))
    x = torch.cat([time[:, None], linear(p, "proj_in", x)], dim=1)
    kept: list[Tensor] = []
    for i in range(layers):
        block = f"blocks.{i}"
        if i > layers // 2:
            x = norm(
                p, f"{block}.skip_norm", linear(p, f"{block}.skip_linear", torch.cat([kept.pop(), x], -1))
            )
        y = norm(p, f"{block}.norm1", x)
        x = x + _triposg_attention(p, f"{block}.attn1", y, y, heads, True)
        x = x + _triposg_attention(p, f"{block}.attn2", norm(p, f"{block}.norm2", x), condition, heads, False)
        x = x + _feed_forward(p, f"{block}.ff", norm(p, f"{block}.norm3", x))
        if i < layers // 2:
            kept.append(x)
    return linear(p, "proj_out", norm(p, "norm_out", x)[:, 1:])


def _triposg_block(p: State, name: str, x: Tensor, heads: int, data: Tensor | None = None) -> Tensor:
    if data is None:
        y = norm(p, f"{name}.norm1", x)
        x = x + _triposg_attention(p, f"{name}.attn1", y, y, heads, True)
    else:
        read = norm(p, f"{name}.attn2.norm_cross", data)
        x = x + _triposg_attention(p, f"{name}.attn2", norm(p, f"{name}.norm2", x), read, heads, False)
    return x + _feed_forward(p, f"{name}.ff", norm(p, f"{name}.norm3", x))


def triposg_field(p: State, heads: int, layers: int, latents: Tensor, points: Tensor) -> Tensor:
    """The decoder's own output (B,P): negative inside."""
    tokens = linear(p, "post_quant", latents)
    for i in range(layers):
        tokens = _triposg_block(p, f"decoder.blocks.{i}", tokens, heads)
    x = linear(p, "decoder.proj_query", point_features(points))
    x = _triposg_block(p, f"decoder.blocks.{layers}", x, heads, tokens)
    return linear(p, "decoder.proj_out", norm(p, "decoder.norm_out", x))[..., 0]


def triposg_moments(p: State, heads: int, layers: int, surface: Tensor, chosen: list[int]) -> Tensor:
    """surface (1,P,6), the query points' numbers -> mean and log variance side by side (1,N,2L)."""
    features = torch.cat([point_features(surface[..., :3]), surface[..., 3:]], -1)
    data = linear(p, "encoder.proj_in", features)
    x = _triposg_block(p, "encoder.blocks.0", data[:, chosen], heads, data)
    for i in range(1, layers + 1):
        x = _triposg_block(p, f"encoder.blocks.{i}", x, heads)
    return linear(p, "quant", norm(p, "encoder.norm_out", x))


# --------------------------------------------------------------------------------------------------------- Step1X-3D


def _heads(x: Tensor, H: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], H, -1)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, 1e-6) * (1 + scale[:, None]) + shift[:, None]


def step1x_output(
    p: State, heads: int, layers: int, singles: int, x: Tensor, timestep: Tensor, condition: Tensor
) -> Tensor:
    """The network's own output at its own time 0 .. 1000 (1000 is noise): noise - data."""
    p = {name.removeprefix("dit_model."): tensor for name, tensor in p.items()}
    W, M = p["proj_in.weight"].shape[0], condition.shape[1]
    vec = time_features(timestep, W).to(x)
    vec = silu(linear(p, "time_proj.linear_2", gelu(linear(p, "time_proj.linear_1", vec))))
    x, c = linear(p, "proj_in", x), linear(p, "proj_cross_attention", condition)
    for i in range(layers):
        b = f"transformer_blocks.{i}"
        xs = linear(p, f"{b}.norm1.linear", vec).chunk(6, -1)
        cs = linear(p, f"{b}.norm1_context.linear", vec).chunk(6, -1)
        xn, cn = _modulated(x, xs[0], xs[1]), _modulated(c, cs[0], cs[1])
        q = rms(p, f"{b}.attn.norm_q", _heads(linear(p, f"{b}.attn.to_q", xn), heads))
        k = rms(p, f"{b}.attn.norm_k", _heads(linear(p, f"{b}.attn.to_k", xn), heads))
        v = _heads(linear(p, f"{b}.attn.to_v", xn), heads)
        cq = rms(p, f"{b}.attn.norm_added_q", _heads(linear(p, f"{b}.attn.add_q_proj", cn), heads))
        ck = rms(p, f"{b}.attn.norm_added_k", _heads(linear(p, f"{b}.attn.add_k_proj", cn), heads))
        cv = _heads(linear(p, f"{b}.attn.add_v_proj", cn), heads)
        both = attention(torch.cat([cq, q], 1), torch.cat([ck, k], 1), torch.cat([cv, v], 1))
        x = x + xs[2][:, None] * linear(p, f"{b}.attn.to_out.0", both[:, M:])
        c = c + cs[2][:, None] * linear(p, f"{b}.attn.to_add_out", both[:, :M])
        hidden = tanh_gelu(linear(p, f"{b}.ff.net.0.proj", _modulated(x, xs[3], xs[4])))
        x = x + xs[5][:, None] * linear(p, f"{b}.ff.net.2", hidden)
        hidden = tanh_gelu(linear(p, f"{b}.ff_context.net.0.proj", _modulated(c, cs[3], cs[4])))
        c = c + cs[5][:, None] * linear(p, f"{b}.ff_context.net.2", hidden)
    x = torch.cat([c, x], dim=1)
    for i in range(singles):
        b = f"single_transformer_blocks.{i}"
        shift, scale, gate = linear(p, f"{b}.norm.linear", vec).chunk(3, -1)
        y = _modulated(x, shift, scale)
        q = rms(p, f"{b}.attn.norm_q", _heads(linear(p, f"{b}.attn.to_q", y), heads))
        k = rms(p, f"{b}.attn.norm_k", _heads(linear(p, f"{b}.attn.to_k", y), heads))
        out = attention(q, k, _heads(linear(p, f"{b}.attn.to_v", y), heads))
        hidden = tanh_gelu(linear(p, f"{b}.proj_mlp", y))
        x = x + gate[:, None] * linear(p, f"{b}.proj_out", torch.cat([out, hidden], -1))
    scale, shift = linear(p, "norm_out.linear", vec).chunk(2, -1)
    return linear(p, "proj_out", _modulated(x[:, M:], shift, scale))


def _step1x_mlp(p: State, name: str, x: Tensor) -> Tensor:
    return linear(p, f"{name}.mlp.c_proj", gelu(linear(p, f"{name}.mlp.c_fc", x)))


def _step1x_self(p: State, name: str, x: Tensor, heads: int) -> Tensor:
    d = x.shape[-1] // heads
    q, k, v = _heads(linear(p, f"{name}.attn.c_qkv", norm(p, f"{name}.ln_1", x)), heads).split(d, -1)
    x = x + linear(p, f"{name}.attn.c_proj", attention(q, k, v))
    return x + _step1x_mlp(p, name, norm(p, f"{name}.ln_2", x))


def _step1x_cross(p: State, name: str, x: Tensor, data: Tensor, heads: int) -> Tensor:
    d = x.shape[-1] // heads
    q = _heads(linear(p, f"{name}.attn.c_q", norm(p, f"{name}.ln_1", x)), heads)
    k, v = _heads(linear(p, f"{name}.attn.c_kv", norm(p, f"{name}.ln_2", data)), heads).split(d, -1)
    x = x + linear(p, f"{name}.attn.c_proj", attention(q, k, v))
    return x + _step1x_mlp(p, name, norm(p, f"{name}.ln_3", x))


def step1x_field(p: State, heads: int, layers: int, scale: float, latents: Tensor, points: Tensor) -> Tensor:
    """The decoder's own output (B,P): positive inside."""
    tokens = linear(p, "post_kl", latents / scale)
    for i in range(layers):
        tokens = _step1x_self(p, f"transformer.resblocks.{i}", tokens, heads)
    x = linear(p, "decoder.query_proj", point_features(points))
    x = _step1x_cross(p, "decoder.cross_attn_decoder", x, tokens, heads)
    return linear(p, "decoder.output_proj", norm(p, "decoder.ln_post", x))[..., 0]


def step1x_moments(
    p: State, heads: int, layers: int, surface: Tensor, sharp: Tensor, chosen: tuple[list[int], list[int]]
) -> Tensor:
    """surface, sharp (1,P,6), the query points' numbers in each -> mean and log variance side by side (1,N,2C)."""
    flat = linear(
        p, "encoder.input_proj", torch.cat([point_features(surface[..., :3]), surface[..., 3:]], -1)
    )
    edge = linear(
        p, "encoder.input_proj_sharp", torch.cat([point_features(sharp[..., :3]), sharp[..., 3:]], -1)
    )
    queries = torch.cat([flat[:, chosen[0]], edge[:, chosen[1]]], dim=1)
    x = _step1x_cross(p, "encoder.cross_attn", queries, flat, heads)
    x = x + _step1x_cross(p, "encoder.cross_attn_sharp", queries, edge, heads)
    for i in range(layers):
        x = _step1x_self(p, f"encoder.self_attn.resblocks.{i}", x, heads)
    return linear(p, "pre_kl", norm(p, "encoder.ln_post", x))
