"""How a mesh is scored: `evaluate_pair(pred, gt)` for two meshes, `scripts/evaluate.py` for two folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic3d.evaluation.protocol import PairScores, evaluate_pair

__all__ = ["PairScores", "evaluate_pair"]


def __getattr__(name: str) -> Any:
    """Imported when they are first asked for: the options of evaluation need no mesh library."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from elastic3d.evaluation import protocol

    return getattr(protocol, name)
