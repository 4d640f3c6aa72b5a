"""Routers on a stock pipeline of diffusers.

python examples/routers_on_diffusers.py FLUX.1-dev routers "a red fox" fox.png
"""

from __future__ import annotations

import sys

from diffusers import DiffusionPipeline

from elastic3d.elastic import attach, detach
from elastic3d.elastic.trace import trace_dense_flops, trace_flops


def main(
    weights: str, routers: str | None, prompt: str, output: str, budget: float = 0.5, **options: object
) -> float:
    """The share of the dense FLOPs that was executed; `routers` are trained ones, None fresh ones that run dense."""
    pipeline = DiffusionPipeline.from_pretrained(weights)
    session = attach(pipeline, routers)
    session.settings.budget = budget
    pipeline(prompt, **options).images[0].save(output)
    trace = session.trace  # what every block did at every step
    executed = float(trace_flops(trace).sum() / trace_dense_flops(trace).sum())
    print(f"{output}: {executed:.0%} of the dense FLOPs executed")
    detach(pipeline)  # the pipeline is what it was
    return executed


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python examples/routers_on_diffusers.py WEIGHTS ROUTERS PROMPT IMAGE")
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4])
