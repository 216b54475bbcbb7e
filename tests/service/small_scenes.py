"""Drawn scenes in COCO's layout and a small classifier to begin with, for the tests of detectors' jobs."""

from pathlib import Path
from typing import Any

from pipelines.drawing import coco_export
from service import config
from service.config import DetectionConfig

CLASSES = 3
# An input of one or two objects' size: the pyramid's levels begin at 1/8 of it.
RETINANET = {"fpn_channels": 16, "anchor_sizes": [8, 16, 32, 64, 128], "trainable_layers": 3}


def drawn(root: Path, train: int = 12, val: int = 6) -> Path:
    coco_export.export(root, coco_export.Scenes(train_count=train, val_count=val, size=96, classes=CLASSES, most=3))
    return root


def job(root: Path, backbone: Path | str, **values: Any) -> DetectionConfig:
    found = config.resolve_any(
        {
            "job": "detect",
            "output": str(root / "runs"),
            "device": "cpu",
            "precision": "fp32",
            "duration": "4 steps",
            "global_batch": 4,
            "micro_batch": 2,
            "data": {"root": str(root / "scenes"), "short_sides": [64], "long_side": 96, "loader": "torch"},
            "model": {"backbone": str(backbone), "options": RETINANET},
            "schedule": {"warmup": "2 steps", "milestones": ["3 steps"]},
            **values,
        }
    )
    assert isinstance(found, DetectionConfig)
    return found
