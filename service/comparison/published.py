"""What the LoRot paper prints (tables 6, 9 and 10), and when a result of ours may stand beside it.

Moon, Kim, Heo, "Tailoring Self-Supervision for Supervised Learning", ECCV 2022. Numbers are in per cent, as printed.
A printed number belongs to a setting: the data, the network, the method, the recipe. Ours stands beside it only if all
that can be known of the setting is the same; otherwise `differences` says what is not.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipelines import pretext
from pipelines.manifest import Manifest
from service import config, config_file
from service.bundle import Card
from service.config import DetectionConfig
from service.importing import imagenet
from service.transfer import CONFIGS

SOURCE = "LoRot paper, ECCV 2022"
NETWORK = "ResNet-50"
_SIZE = 224
_VAL_IMAGES = 50_000
_COCO_IMAGES = (118_287, 5_000)
_COCO_GAPS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
COCO_IDS = tuple(str(number) for number in range(1, 91) if number not in _COCO_GAPS)
# (pretext task, objective) as the paper's tables call them.
METHODS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("none", "supervised"): "Baseline",
        ("rotation", "augmentation"): "Rot (DA)",
        ("rotation", "multi_task"): "Rot (MT)",
        ("lorot_i", "multi_task"): "LoRot-I",
        ("lorot_e", "multi_task"): "LoRot-E",
        ("lorot_i", "imported"): "LoRot-I",
        ("lorot_e", "imported"): "LoRot-E",
    }
)
# Recipes with these are of another table, or of none.
_USUAL_AUGMENTATIONS = frozenset({"color_jitter", "lighting"})


@dataclass(frozen=True)
class Table:
    """A printed table: values in per cent by method, and by the metric that ours is called.

    Attributes:
        number: of the table. data: what it was measured on.
    """

    number: int
    data: str
    values: Mapping[str, Mapping[str, float]]

    @property
    def source(self) -> str:
        """Where it is printed."""
        return f"{SOURCE}, table {self.number}"


def _table9(axis: str) -> Table:
    rows = {
        "Baseline": (46.72, 31.55, 14.49, 4.22, 1.91),
        "LoRot-I": (49.73, 35.49, 17.21, 5.08, 2.03),
        "LoRot-E": (50.24, 36.07, 17.81, 5.49, 2.12),
    }
    names = [f"{axis}/top1_loc@{threshold}" for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)]
    return Table(9, "ImageNet", {method: dict(zip(names, row, strict=True)) for method, row in rows.items()})


# By the kind of block of our own table. Table 9 does not say what its thresholds cut, so it is there in both readings.
TABLES: Mapping[str, Table] = MappingProxyType(
    {
        "classify": Table(
            6,
            "ImageNet",
            {
                "Baseline": {"val/top1": 76.32, "val/top5": 92.95},
                "Rot (DA)": {"val/top1": 76.42, "val/top5": 93.06},
                "Rot (MT)": {"val/top1": 76.68, "val/top5": 93.10},
                "LoRot-I": {"val/top1": 77.71, "val/top5": 93.60},
                "LoRot-E": {"val/top1": 77.72, "val/top5": 93.65},
            },
        ),
        "wsol-cam": _table9("cam"),
        "wsol-iou": _table9("iou"),
        "detect": Table(10, "COCO 2017", {"Baseline": {"AP": 33.8}, "LoRot-I": {"AP": 35.3}, "LoRot-E": {"AP": 35.2}}),
        "segment": Table(10, "COCO 2017", {"Baseline": {"AP": 33.7}, "LoRot-I": {"AP": 34.5}, "LoRot-E": {"AP": 34.4}}),
    }
)


def method(card: Card) -> str | None:
    """What the paper calls the way in which a model was trained; None if it has no name for it."""
    usual = task_options(dataclasses.replace(card, pretext_options={}))
    return METHODS.get((card.pretext, card.objective)) if task_options(card) == usual else None


def task_options(card: Card) -> dict[str, Any]:
    """All options of a model's pretext task, those that were not given included."""
    try:
        task = pretext.load(card.pretext, **card.pretext_options)
    except (ValueError, TypeError):
        return dict(card.pretext_options)
    return dataclasses.asdict(task) if dataclasses.is_dataclass(task) else dict(card.pretext_options)


def differences(card: Card) -> tuple[str, ...]:
    """In what a classifier is not one of the paper's on ImageNet, as far as its card tells; empty if in nothing."""
    found = []
    if len(card.classes) != len(imagenet.CLASSES):
        found.append(f"trained on {card.data or 'unknown data'} of {len(card.classes)} classes, not on ImageNet")
    if card.model.get("name") != "resnet50":
        found.append(f"the network is {card.model.get('name')}, not {NETWORK}")
    if card.view.get("size") != _SIZE:
        found.append(f"evaluated at {card.view.get('size')} pixels, not {_SIZE}")
    if method(card) is None:
        found.append(f"pretext task {card.pretext} ({card.objective}) with these options is in no table")
    names = {str(part.get("name")) for part in card.training_view.get("augment", ())}
    if others := names - _USUAL_AUGMENTATIONS:
        found.append(f"trained with {', '.join(sorted(others))}")
    return tuple(found)


def other_images(manifest: Manifest) -> tuple[str, ...]:
    """Why these are not ImageNet's validation images; empty if they are."""
    if tuple(manifest.class_ids) != imagenet.CLASSES:
        return (f"measured on {manifest.name}, not on ImageNet",)
    if len(manifest) != _VAL_IMAGES:
        return (f"measured on {len(manifest):,} images, not on the {_VAL_IMAGES:,} of ImageNet's validation set",)
    return ()


def other_objects(train: Manifest, evaluated: Manifest) -> tuple[str, ...]:
    """Why these are not COCO 2017's training and validation images; empty if they are."""
    if any(tuple(split.class_ids) != COCO_IDS for split in (train, evaluated)):
        return (f"trained and measured on {len(evaluated.classes)} other classes, not on COCO's 80",)
    if (len(train), len(evaluated)) != _COCO_IMAGES:
        wanted = " and ".join(f"{count:,}" for count in _COCO_IMAGES)
        return (f"of {len(train):,} and {len(evaluated):,} images, COCO 2017 has {wanted}",)
    return ()


def other_recipe(job: DetectionConfig) -> tuple[str, ...]:
    """Why a detector's training is not the one that is meant to reproduce table 10; empty if it is."""
    path = config_file.shipped(CONFIGS[job.job])
    known = config.load_any(path, [f"seed={job.seed}", "model.backbone=any"])
    assert isinstance(known, DetectionConfig), "it ships with the program"
    return () if known.digest == job.digest else (f"the detector's recipe is not that of configs/{CONFIGS[job.job]}",)
