"""Figures, returned and not shown; the only folder that knows matplotlib."""

from jaxcats.plots.base import COLOURS, GREY, INK, RIGHT, WRONG, Figure, to_svg, write
from jaxcats.plots.curves import learning_rates, losses, lr_find, schedules
from jaxcats.plots.galleries import LARGEST_SIDE, gallery, heat_maps, overlay, top_loss_titles
from jaxcats.plots.judgement import confusion, per_class, reliability, risk_coverage

__all__ = [
    "COLOURS",
    "GREY",
    "INK",
    "LARGEST_SIDE",
    "RIGHT",
    "WRONG",
    "Figure",
    "confusion",
    "gallery",
    "heat_maps",
    "learning_rates",
    "losses",
    "lr_find",
    "overlay",
    "per_class",
    "reliability",
    "risk_coverage",
    "schedules",
    "to_svg",
    "top_loss_titles",
    "write",
]
