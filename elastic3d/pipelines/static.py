"""Generations in which every block runs: a plain DiT with the few-step LoRA in its weights, compiled on request.

Where nobody decides, a pass depends on nothing but its inputs and the weights. So it is in the dense model, and at a
budget of 1 with the few-step LoRA, whose weights are the same through a whole generation
(`ElasticSession.every_block`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.elastic.attachment import find_session
from elastic3d.elastic.few_step import Key
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.trace import Trace
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.models.weights import plain_twin
from elastic3d.pipelines.runtime import pass_flops

MOST_SHAPES = 16  # of the inputs, with a compiled graph each; others run as they are


class StaticDiT:
    """A plain twin of a DiT, which the sampler calls in generations with the few-step LoRA in which every block runs.

    That is only where the DiT is as it was built: hooks and exchanged modules would be passed over.

    The twin shares the parameters of the DiT. Linear layers with a few-step LoRA get weights of their own with the
    first generation that uses it; another coarseness is merged into these in place.
    """

    def __init__(self, dit: ShapeDiT | SkipDiT) -> None:
        self.dit = dit
        self._of: tuple[object, ...] | None = None  # what the twin was made of
        self._merged: list[Key] = []

    @torch.no_grad()
    def begin(self, condition: Tensor, times: Tensor, guidance: float) -> StaticDiT | None:
        """This object, ready for a generation at `times` (S+1,) in which every block runs; None for any other.

        The settings are those of the DiT's session, which gets the trace. `condition` (B,M,Cc) are the tokens of the
        generation.
        """
        session = find_session(self.dit)
        moments = times.tolist()[:-1]
        scale = None if guidance <= 1.0 or self.dit.config.guidance_embed else guidance
        if session is not None:
            session.coarsen(len(moments), session.settings.budget, scale, moments)
        if not ((session is None or session.every_block) and self._takes(session)):
            return None
        self._refresh(session)
        if session is not None and session.settings.elastic:
            names, ratios = [block.name for block in session.blocks], session.router_config.ratios
            trace = session.trace = Trace(names, ratios, len(moments), len(condition), session.guided)
            trace.flops[0].update(enumerate(pass_flops(self.dit, condition.shape[1])))
            for step, t in enumerate(moments):
                branches = 1 if scale is None or session.one_branch(t) else 2
                trace.actions[step, :branches] = len(ratios)  # each block at full width
        return self

    def __call__(
        self, latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """As the DiT: latents (B,N,C), t (B,), condition (B,M,Cc), guidance (B,) or None -> velocity (B,N,C)."""
        return self.twin(latents, t, condition, guidance)

    def _takes(self, session: ElasticSession | None) -> bool:
        """Whether the LoRA is used, nobody listens to modules of the DiT, and each is of PyTorch or this package."""
        if session is None or not session.settings.elastic:
            return False
        routed = {id(block.inner) for block in session.blocks}  # whose forward is the session's
        return len(self.dit._forward_pre_hooks) == 1 and not any(
            module._forward_hooks
            or (module._forward_pre_hooks and module is not self.dit)
            or ("forward" in module.__dict__ and id(module) not in routed)
            or not type(module).__module__.startswith(("torch.nn.", "elastic3d.models."))
            for module in self.dit.modules()
        )

    def _refresh(self, session: ElasticSession | None) -> None:
        """The weights of this generation; a twin where there is none yet of these parameters."""
        first = next(self.dit.parameters())
        made_of = session, first.device, first.dtype, *map(id, self.dit.parameters())
        if made_of != self._of:
            self.twin: nn.Module = plain_twin(self.dit)
            self._of, self._merged = made_of, []
            if session is not None:
                session.forget()  # weights that earlier generations made for themselves
        if session is None or (session.coarseness is None and not self._merged):
            return
        coarse = session.coarseness
        blocks = [(block, lora) for block in session.blocks if (lora := block.few_step) is not None]
        state = [lora.state(block.inner, coarse) for block, lora in blocks]
        if state != self._merged:
            for block, lora in blocks:
                lora.merge(block.inner, self.twin.get_submodule(block.name), coarse)
            self._merged = state


class CompiledDiT(StaticDiT):
    """A compiled twin, which takes every generation in which every block runs, the dense model's too.

    As the LoRA is merged in place, compiled graphs stay as they are. There is one for each number of rows: for both
    guidance branches, and for the conditional one alone.
    """

    def __init__(self, dit: ShapeDiT | SkipDiT, arguments: dict[str, Any]) -> None:
        """`arguments` are of `torch.compile`, over the defaults. UserError where that does not work, which is tried, or
        for a model whose experts take the tokens that they choose."""
        if isinstance(dit, SkipDiT) and dit.config.expert_blocks:
            raise UserError("compile is true, but the experts of this model decide which tokens they take")
        if "backend" not in arguments:
            check_compiler(next(dit.parameters()).device)
        super().__init__(dit)
        self.arguments = arguments
        self._shapes: set[tuple[torch.Size, torch.Size]] = set()  # of inputs that there is a graph for

    def __call__(
        self, latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        shapes = latents.shape, condition.shape
        if shapes not in self._shapes and len(self._shapes) == MOST_SHAPES:
            return self.twin(latents, t, condition, guidance)
        self._shapes.add(shapes)
        if latents.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self._graph(latents, t, condition, guidance).clone()  # the next pass may overwrite it

    def _takes(self, session: ElasticSession | None) -> bool:
        """Unless somebody listens to what modules of the DiT put out, as a calibration does."""
        return not any(module._forward_hooks for module in self.dit.modules())

    def _refresh(self, session: ElasticSession | None) -> None:
        made_of = self._of
        super()._refresh(session)
        if self._of is not made_of:
            device = next(self.dit.parameters()).device
            self._graph = torch.compile(self.twin, **compile_arguments(device, **self.arguments))
            self._shapes = set()


def compile_arguments(device: torch.device, **own: Any) -> dict[str, Any]:
    """Of `torch.compile`: one graph for each shape; CUDA graphs are its mode `reduce-overhead`, which it does not take
    beside `options`. `own` go over these defaults."""
    mode = {"mode": "reduce-overhead"} if device.type == "cuda" and "options" not in own else {}
    whole = {"fullgraph": True, "dynamic": False}
    return whole | mode | {"isolate_recompiles": True, "recompile_limit": 2 * MOST_SHAPES} | own


def check_compiler(device: torch.device) -> None:
    """UserError unless `torch.compile` works on a device. It is tried: compilers, headers and Triton may be missing."""
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # of whichever part
        why = str(error).strip().splitlines()[0]
        raise UserError(
            f"compile is true, but torch.compile does not work on this {device.type}: {why}"
        ) from error
