"""How far fixed routes lead a text-to-image transformer from its dense velocity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elastic3d.benchmark.execute import error_of_routes, following
from elastic3d.diffusion.flow import interpolate
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.context import Branch, RouteSource
from elastic3d.pipelines.text_to_image import Settings, TextToImagePipeline

NEGATIVE = "negative_"


@torch.no_grad()
def velocity_error(
    pipeline: TextToImagePipeline,
    settings: Settings,
    data: Tensor,
    condition: tuple[dict[str, Tensor], dict[str, Any]],
    calls: int,
) -> Callable[[Tensor], float]:
    """Fixed routes (I,) -> relative squared error of the guided velocity, on `calls` random times a sample.

    Args:
        settings: steps, guidance and size of the generations that the routes are for.
        data: latents (B,N,C) that the dense model made under the condition.
        condition: the arguments of the stock pipeline, of the prompts and of the guidance.
    """
    backbone, session = pipeline.backbone, pipeline.session
    assert session is not None
    text, rest = condition
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(data.shape, generator=generator).to(data)
    t = torch.rand(len(data) * calls, generator=generator).to(data.device)
    x = interpolate(noise.repeat(calls, 1, 1), data.repeat(calls, 1, 1), t)
    branches = [text]
    if any(name.startswith(NEGATIVE) for name in rest):
        branches.append({name.removeprefix(NEGATIVE): v for name, v in rest.items() if torch.is_tensor(v)})
    repeated = [{k: v.repeat(calls, *[1] * (v.ndim - 1)) for k, v in each.items()} for each in branches]

    @torch.no_grad()
    def velocity(elastic: ElasticConfig, routes: RouteSource | None) -> Tensor:
        session.settings = elastic
        found = []
        with following(session, routes):
            session.begin(len(x), 1)
            for branch, each in zip(Branch, repeated, strict=False):
                session.step(0, 1 / settings.steps, (branch,))
                v = backbone.velocity(backbone.transformer, x, t, each, settings.size, settings.guidance)
                found.append(v.float())
        session.end()
        return found[0] if len(found) == 1 else found[1] + settings.guidance * (found[0] - found[1])

    return error_of_routes(velocity, session.router_config.widths)
