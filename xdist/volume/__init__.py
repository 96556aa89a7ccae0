"""What a segmenter is judged by: Dice, thresholds as a baseline, label maps and pictures."""

from __future__ import annotations

from xdist.volume.dice import confusion, dice
from xdist.volume.montage import montage, write_png
from xdist.volume.thresholds import Thresholds, best_thresholds

__all__ = ["Thresholds", "best_thresholds", "confusion", "dice", "montage", "write_png"]
