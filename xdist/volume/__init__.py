"""What a segmenter is judged by: Dice, thresholds as a baseline, label maps and pictures."""

from __future__ import annotations

from xdist.volume.dice import confusion, dice
from xdist.volume.montage import montage, write_png
from xdist.volume.thresholds import Thresholds, Tissues, best_thresholds, tissues_of

__all__ = [
    "Thresholds", "Tissues", "best_thresholds", "confusion", "dice", "montage", "tissues_of",
    "write_png",
]  # fmt: skip
