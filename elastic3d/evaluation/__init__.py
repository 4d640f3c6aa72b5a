"""How a mesh is scored: `evaluate_pair(pred, gt)` for two meshes, `scripts/evaluate.py` for two folders."""

from elastic3d.evaluation.protocol import PairScores, evaluate_pair

__all__ = ["PairScores", "evaluate_pair"]
