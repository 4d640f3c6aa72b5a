"""Elastic diffusion transformers: routers decide which blocks run, at which width, and what is reused.

    from elastic3d.elastic import attach, detach

    session = attach(model)                 # fresh routers
    session = attach(model, "routers/")     # trained ones, saved by `save_routers`
    detach(model)                           # the base model again

`model` may also be a pipeline of diffusers: its transformer gets the routers, and its loop drives the session.

Read in this order, like the method section of E-DiT (2602.13993): `config`, what is requested; `router`, from tokens to
a decision; `width` and `cache`, the narrower and the earlier result; `context`, what a forward pass is given;
`few_step`, weights for few evaluations of the model; `block`, what a decision does; `session`, the state of a
generation and who decides in it; `trace`, its record. Around the method: `families`, how each kind of block is called;
`rows`, some rows of a batch; `attachment`, routers on a model and in files; `diffusers_loop`, stock pipelines. Beside
it, for models without routers: `training_free`, a budget kept by a plan and a fitted forecast.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "adapter_for",
    "attach",
    "detach",
    "find_session",
    "has_routers",
    "load_routers",
    "save_routers",
    "session_of",
]


def __getattr__(name: str) -> Any:
    """Found when they are asked for, so that options can be read without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.attachment"), name)
