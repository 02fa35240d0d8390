"""Every figure, as a function that returns a Figure. This is the only folder that imports matplotlib."""

from jaxcats.plots.base import Figure, to_svg, write
from jaxcats.plots.curves import learning_rates, losses, lr_find
from jaxcats.plots.evaluation import confusion, per_class, reliability, risk_coverage
from jaxcats.plots.galleries import gallery, heat_maps, top_loss_titles

__all__ = [
    "Figure",
    "confusion",
    "gallery",
    "heat_maps",
    "learning_rates",
    "losses",
    "lr_find",
    "per_class",
    "reliability",
    "risk_coverage",
    "to_svg",
    "top_loss_titles",
    "write",
]
