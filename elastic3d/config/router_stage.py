"""Options of training routers (`scripts/train.py stage=router`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from elastic3d.config.base import check_range, option
from elastic3d.config.routing import MIN_BUDGET


class TrainedParts(Enum):
    """What learns: the routers alone, also low-rank updates of the blocks, or everything (E-DiT)."""

    routers = "routers"
    lora = "lora"
    full = "full"


class GateLoss(Enum):
    """How gates learn: straight through their hard decision (E-DiT), or by predicting the damage that is done where
    the blocks of a step do not run but go on with what they remember."""

    straight_through = "straight_through"
    damage = "damage"


class CostLoss(Enum):
    """What holds the cost: the executed FLOPs to the budget, or E-DiT's mean gate and width to constants."""

    executed = "executed"
    paper = "paper"


class Curve(Enum):
    """What a calibration does with a curve over time: `choose` it anew, or `keep` what is there."""

    choose = "choose"
    keep = "keep"


@dataclass(kw_only=True)
class MeshLossConfig:
    """Mesh reconstruction loss: the shape that the elastic velocity implies, against the true surface."""

    weight: float = option(0.1, "of the whole mesh loss; 0 leaves it out")
    share: float = option(0.25, "share of a batch's samples that are decoded")
    field: float = option(1.0, "weight of the field at points with a known signed distance")
    chamfer: float = option(10.0, "weight of the squared Chamfer distance of surface points")
    normals: float = option(0.1, "weight of the disagreement of their normals")
    silhouette: float = option(
        0.0, "weight of the shape's silhouette in one of its rendered views; 0 leaves it out"
    )
    near_queries: int = option(256, "points near the surface with a known distance")
    volume_queries: int = option(128, "such points anywhere in the box")
    surface_points: int = option(128, "surface points in Chamfer distance and normals")
    jitter: float = option(0.02, "standard deviation of the offset at which their search starts")
    rays: int = option(64, "rays of the silhouette")
    ray_points: int = option(64, "points of a ray, of which the one deepest inside counts")
    time_power: float = option(2.0, "a sample counts t to this power: noisy latents imply no sharp shape")

    def __post_init__(self) -> None:
        for name in ("weight", "field", "chamfer", "normals", "silhouette"):
            check_range(f"routing.mesh.{name}", getattr(self, name), 0, 1e6)
        check_range("routing.mesh.share", self.share, 0, 1)
        check_range("routing.mesh.jitter", self.jitter, 0, 0.1)
        check_range("routing.mesh.time_power", self.time_power, 0, 20)
        for name in ("near_queries", "volume_queries", "surface_points", "rays", "ray_points"):
            check_range(f"routing.mesh.{name}", getattr(self, name), 1, 1 << 16)


@dataclass(kw_only=True)
class PictureLossConfig:
    """Picture reconstruction loss: what the elastic velocity implies, decoded, against the true picture."""

    weight: float = option(0.1, "of the whole term; 0 leaves it out")
    share: float = option(0.25, "share of a batch's samples that are decoded")
    scales: int = option(3, "resolutions at which pictures are compared, each half the one before")
    time_power: float = option(2.0, "a sample counts t to this power: noisy latents imply no sharp picture")

    def __post_init__(self) -> None:
        check_range("routing.picture.weight", self.weight, 0, 1e6)
        check_range("routing.picture.share", self.share, 0, 1)
        check_range("routing.picture.scales", self.scales, 1, 8)
        check_range("routing.picture.time_power", self.time_power, 0, 20)


@dataclass(kw_only=True)
class RouterStageConfig:
    """The routers' training."""

    model: Path = option(Path("runs/dit/export"), "folder of the dense pipeline")
    parts: TrainedParts = option(TrainedParts.routers, "what learns")
    lora_rank: int = option(16, "rank of the low-rank updates")
    base_rate: float = option(0.1, "learning rate of the base model's weights over the routers'")
    guidance: float = option(
        3.0, "guidance at which both branches are distilled together; 1 trains them apart"
    )
    min_steps: int = option(8, "fewest sampling steps whose step sizes and times are trained")
    max_steps: int = option(50, "most of them")
    min_budget: float = option(MIN_BUDGET, "smallest budget to train for; the largest is 1")
    explore: float = option(
        1.0, "share of the closed blocks that run all the same; the others are really skipped"
    )
    gate: GateLoss = option(
        GateLoss.straight_through, "how gates learn; damage needs routers that decide together and reuse"
    )
    late_weight: float = option(
        1.0, "gate damage: weight of an error at t = 1, with 1 at t = 0, linear between"
    )
    recalled: int = option(
        3, "router.longest above 0: earlier steps whose residuals are computed for a batch"
    )
    renewal: float = option(0.5, "of these: chance that a block was computed again at a step")
    cost: CostLoss = option(CostLoss.executed, "what holds the cost")
    cost_weight: float = option(20.0, "weight of the cost loss (lambda)")
    slack: float = option(
        0.1, "a sample's cost may differ from its budget by this, as long as the mean does not"
    )
    rho_gate: float = option(0.6, "cost paper: target of the mean gate")
    rho_width: float = option(0.5, "cost paper: target of the mean width of open blocks")
    distillation: float = option(1.0, "weight of the distance to the dense velocity")
    flow: float = option(0.1, "weight of flow matching")
    mesh: MeshLossConfig = option(MeshLossConfig, "mesh reconstruction loss")
    picture: PictureLossConfig = option(
        PictureLossConfig, "picture reconstruction loss, in the mesh loss' place"
    )
    val_budgets: list[float] = option([0.9, 0.7, 0.5, 0.3], "budgets to validate at")
    val_shapes: int = option(
        8,
        "validation shapes that are generated at each of them; stage=export, calibrate: to calibrate budgets on",
    )
    val_steps: int = option(16, "sampling steps of it")
    trends: Curve = option(
        Curve.choose, "stage=export, calibrate: choose the forecasts' curve over time anew, or keep it"
    )
    urgency: Curve = option(
        Curve.choose, "stage=export, calibrate: choose the gates' curve over time anew, or keep it"
    )

    def __post_init__(self) -> None:
        check_range("routing.lora_rank", self.lora_rank, 1, 4096)
        check_range("routing.base_rate", self.base_rate, 0, 10)
        check_range("routing.guidance", self.guidance, 0, 100)
        check_range("routing.min_steps", self.min_steps, 1, 1000)
        check_range("routing.max_steps", self.max_steps, self.min_steps, 1000)
        check_range("routing.explore", self.explore, 0, 1)
        check_range("routing.slack", self.slack, 0, 1)
        check_range("routing.late_weight", self.late_weight, 0, 1)
        check_range("routing.recalled", self.recalled, 1, 16)
        check_range("routing.renewal", self.renewal, 0.05, 1)
        for name in ("cost_weight", "distillation", "flow"):
            check_range(f"routing.{name}", getattr(self, name), 0, 1e6)
        for name in ("rho_gate", "rho_width"):
            check_range(f"routing.{name}", getattr(self, name), 0, 1)
        for budget in (self.min_budget, *self.val_budgets):
            check_range("routing.val_budgets", budget, MIN_BUDGET, 1)
        check_range("routing.val_shapes", self.val_shapes, 1, 1 << 16)
        check_range("routing.val_steps", self.val_steps, 1, 1000)
