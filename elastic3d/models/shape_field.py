"""The field of decoded shapes, prepared once for the hundred thousands of points at which a decoder asks for it.

`ShapeVAE.query` does for each call what depends on the tokens alone. Here keys and values are computed once a shape,
and so is what a point reads from its neighbours: the Fourier embedding of the offset to an anchor is, by the addition
theorems, a linear function of the embedding of the point itself. So the first layer of the local features becomes one
matrix an anchor, and all pairs of a point and a neighbour are done by one product an anchor, without gathering
features or embedding offsets. The farthest of the neighbours has no weight and is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from elastic3d.models.layers import fourier_embedding
from elastic3d.models.local import OFFSET_FREQS, OFFSET_SCALE, LocalFeatures, fade_weights

if TYPE_CHECKING:
    from elastic3d.models.options import VAEConfig
    from elastic3d.models.shape_vae import GeoDecoder, ShapeVAE

_ROWS = 4096  # points at a time on a CPU: their activations stay in its cache


class ShapeField:
    """field(points (1,P,3), sample (1,)) -> (1,P) fp32, positive inside: what `geometry.decode` evaluates.

    Equal to `ShapeVAE.query` within rounding; for inference only.
    """

    def __init__(self, vae: ShapeVAE, tokens: Tensor) -> None:
        """tokens (B,N,D) as `ShapeVAE.decode` gives them."""
        self.vae, self.tokens = vae, tokens
        self._sample = -1
        self._reader: _Reader | None = None

    @torch.no_grad()
    def __call__(self, points: Tensor, sample: Tensor) -> Tensor:
        """The field of one sample at points (1,P,3)."""
        number = int(sample)
        if number != self._sample or self._reader is None:
            self._reader = _reader(self.vae, self.tokens[number : number + 1])
            self._sample = number
        return self._reader(points)


def _reader(vae: ShapeVAE, tokens: Tensor) -> _Reader:
    """For tokens (1,N,D): by anchors' matrices in fp32 on a CPU, else by the modules as they are.

    A product an anchor is many small kernels for a GPU; and half precision loses the small difference between a point
    and its anchor if both are embedded apart.
    """
    anchors = None
    if vae.config.anchored:
        anchors, tokens = tokens[..., :3], tokens[..., 3:]
    dtype = vae.post_kl.weight.dtype
    plain = tokens.device.type != "cpu" or dtype != torch.float32
    if anchors is not None and vae.config.neighbours_out > 1 and not plain:
        return _AnchorReader(vae.geo_decoder, tokens.to(dtype), anchors)
    return _Reader(vae.geo_decoder, tokens.to(dtype), anchors)


class _Reader:
    """One sample's field by the decoder's own modules, with keys and values kept."""

    def __init__(self, geo: GeoDecoder, tokens: Tensor, anchors: Tensor | None) -> None:
        if geo.config.geo_downsample > 1:
            tokens = geo.latents_proj(tokens)
        self.geo, self.tokens, self.anchors = geo, tokens, anchors
        block = geo.cross_attn_decoder
        self.keys, self.values = block.attn.keys_values(block.ln_2(tokens), anchors)
        self.rows = _ROWS if tokens.device.type == "cpu" else 1 << 30

    def __call__(self, points: Tensor) -> Tensor:
        """points (1,P,3) -> (1,P) fp32."""
        return torch.cat([self._read(chunk) for chunk in points.split(self.rows, dim=1)], dim=1)

    def _read(self, points: Tensor) -> Tensor:
        x = self._attended(self._embed(points), points)
        block = self.geo.cross_attn_decoder
        x = x + block.mlp(block.ln_3(x))
        return self.geo.output_proj(self.geo.ln_post(x)).squeeze(-1).float()

    def _embed(self, points: Tensor) -> Tensor:
        """Queries (1,P,D) before attention."""
        return self.geo.embed(points, self.tokens, self.anchors)

    def _attended(self, x: Tensor, points: Tensor) -> Tensor:
        """Queries x (1,P,D) with what they read from the tokens."""
        block = self.geo.cross_attn_decoder
        return x + block.attn.read(block.ln_1(x), points, self.keys, self.values)


class _AnchorReader(_Reader):
    """As `_Reader`, with the local features by a matrix an anchor, and values already projected. fp32."""

    def __init__(self, geo: GeoDecoder, tokens: Tensor, anchors: Tensor) -> None:
        super().__init__(geo, tokens, anchors)
        local: LocalFeatures = geo.local
        self.columns = _offset_columns(geo.config)
        self.matrices, self.biases = _anchor_matrices(local, self.tokens[0], anchors[0])
        self.points = anchors[0].float()
        self.squares = self.points.square().sum(dim=-1)
        both = torch.cat([geo.query_proj.weight, local.out_proj.weight], dim=1)
        self.query = both.T.contiguous(), geo.query_proj.bias + local.out_proj.bias
        # A head's output goes through its own columns of the projection: (weights V) W = weights (V W), whose sum
        # over the heads needs no copy that brings them side by side.
        heads = self.values.shape[1]
        columns = rearrange(geo.cross_attn_decoder.attn.c_proj.weight, "D (H d) -> H d D", H=heads)
        self.projected = torch.bmm(self.values[0], columns)
        self.keys_across = self.keys[0].transpose(1, 2).contiguous()

    def _embed(self, points: Tensor) -> Tensor:
        position = fourier_embedding(points[0], self.geo.config.num_freqs, self.geo.config.include_pi)
        offsets = torch.cat([points[0], *_sines(points[0])], dim=-1) if self.columns is None else position
        weight, bias = self.query
        pooled = self._pooled(points[0], offsets)
        return torch.addmm(bias, torch.cat([position, pooled], dim=-1), weight)[None]

    def _attended(self, x: Tensor, points: Tensor) -> Tensor:
        block = self.geo.cross_attn_decoder
        attention = block.attn
        q = rearrange(attention.c_q(block.ln_1(x)), "B P (H d) -> B H P d", H=attention.heads)
        if attention.attention is not None:
            q = attention.attention.q_norm(q)
        assert attention.distance is not None  # anchors have it
        q = attention.distance.extend_queries(q, points)[0]
        out = x[0] + attention.c_proj.bias
        for weights, values in zip(
            torch.bmm(q, self.keys_across).softmax(dim=-1), self.projected, strict=True
        ):
            out.addmm_(weights, values)
        return out[None]

    def _pooled(self, points: Tensor, offsets: Tensor) -> Tensor:
        """The local features (P,h) before their last layer, of points (P,3) with embeddings `offsets` (P,E)."""
        local, P = self.geo.local, len(points)
        squared = torch.addmm(self.squares, points, self.points.T, alpha=-2.0)
        near, index = squared.topk(local.neighbours, dim=-1, largest=False)
        weights = fade_weights(near + points.square().sum(dim=-1, keepdim=True))[:, :-1]
        anchor = index[:, :-1].flatten()
        order = anchor.argsort()
        rows = offsets if self.columns is None else offsets[:, self.columns]
        rows = rows.index_select(0, order.div(local.neighbours - 1, rounding_mode="floor"))
        hidden = rows.new_empty(len(anchor), self.biases.shape[1])
        counts = torch.bincount(anchor, minlength=len(self.biases)).tolist()
        parts = zip(hidden.split(counts), rows.split(counts), self.biases, self.matrices, strict=True)
        for out, part, bias, matrix in parts:
            if len(part):
                torch.addmm(bias, part, matrix, out=out)
        hidden = nn.functional.gelu(local.hidden_proj(nn.functional.gelu(hidden)))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        return nn.functional.embedding_bag(
            place.view(P, -1), hidden, per_sample_weights=weights.contiguous(), mode="sum"
        )


def _anchor_matrices(local: LocalFeatures, features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """(N,E,h) and (N,h): an embedded point -> the first hidden layer of what it reads from each anchor (N,3).

    The embedding of a point x is x, sin(w x), cos(w x) with w = `OFFSET_SCALE` times the octaves. For the offset to an
    anchor a, sin(w (x - a)) = sin(w x) cos(w a) - cos(w x) sin(w a), and likewise the cosine.
    """
    shift, gain = local.feature_proj(features).double().chunk(2, dim=-1)
    plus, times = local.offset_proj.weight.double().chunk(2)
    plus_bias, times_bias = local.offset_proj.bias.double().chunk(2)
    whole = plus + gain[:, :, None] * times  # (N,h,E) of the embedded offset
    linear, sine, cosine = whole.split([3, 3 * OFFSET_FREQS, 3 * OFFSET_FREQS], dim=-1)
    sin, cos = (part[:, None] for part in _sines(anchors.double()))
    matrix = torch.cat([OFFSET_SCALE * linear, sine * cos + cosine * sin, cosine * cos - sine * sin], dim=-1)
    bias = shift + plus_bias + gain * times_bias
    bias = bias - OFFSET_SCALE * (linear @ anchors.double()[:, :, None])[..., 0]
    return matrix.to(features.dtype).transpose(1, 2).contiguous(), bias.to(features.dtype)


def _sines(points: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines (P, 3 OFFSET_FREQS) of points (P,3), axis-major, as the embedding of an offset has them."""
    octaves = OFFSET_SCALE * 2.0 ** torch.arange(OFFSET_FREQS, dtype=points.dtype)
    angles = (points[:, :, None] * octaves).flatten(1)
    return angles.sin(), angles.cos()


def _offset_columns(config: VAEConfig) -> Tensor | None:
    """Where the embedding of a point has the angles of `_sines`; None if some are not there."""
    freqs = config.num_freqs
    first = int(OFFSET_SCALE).bit_length() - 1  # the octave 2^first is OFFSET_SCALE
    if config.include_pi or freqs < first + OFFSET_FREQS:
        return None
    sine = [3 + axis * freqs + first + octave for axis in range(3) for octave in range(OFFSET_FREQS)]
    return torch.tensor([0, 1, 2, *sine, *(3 * freqs + column for column in sine)])
