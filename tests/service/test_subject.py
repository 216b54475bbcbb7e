"""Who is asked about which images, and what tells one result from another."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipelines import manifest
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.plan import View
from service import bundle, provenance
from service.bundle import Card
from service.downstream import subject, wsol
from service.downstream.protocol import OFFICIAL, PAPER
from service.errors import ConfigError, DataError
from service.models import Classifier
from service.registry import Resolved

WHOLE = View(size=32, crop="whole", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CLASSES = ("red", "blue")
ROWS = Rows(np.arange(2), np.full(2, 32), np.full(2, 32), ["0.png", "1.png"])


def images(root: Path) -> Manifest:
    manifest.write(root / "all.arrow", Heading("squares", "val", CLASSES, CLASSES, "0" * 64, ""), ROWS)
    return Manifest.open(root / "all.arrow", root)


def test_classes_may_be_the_datas_names_or_its_ids(tmp_path: Path) -> None:
    data = images(tmp_path)
    named = dataclasses.replace(data.heading, class_ids=("n00000001", "n00000002"))
    manifest.write(tmp_path / "named.arrow", named, ROWS)
    found = Manifest.open(tmp_path / "named.arrow", tmp_path)
    subject.check_classes(found, CLASSES, "models:/m/1")
    subject.check_classes(found, named.class_ids, "models:/m/1")
    for wrong in (named.class_ids[::-1], ("red", "n00000002")):
        with pytest.raises(DataError, match=r"use what it was trained on$"):
            subject.check_classes(found, wrong, "models:/m/1")
    manifest.write(tmp_path / "bare.arrow", dataclasses.replace(named, classes=named.class_ids), ROWS)
    with pytest.raises(DataError, match=r"class 0 is 'n00000001', but 'red' .* put LOC_synset_mapping\.txt beside it"):
        subject.check_classes(Manifest.open(tmp_path / "bare.arrow", tmp_path), CLASSES, "models:/m/1")


def someone(**about: object) -> subject.Subject:
    model = Classifier({"conv": nn.Conv2d(3, 2, 1)}, 2, 2, 0).eval()
    view = bundle.evaluation_view(WHOLE)
    card = Card(model={}, classes=CLASSES, view=view, **about)  # type: ignore[arg-type]
    where = Resolved(Path("run/model"), "models:/m/1", "m", 1, "abc")
    return subject.Subject(model, card, where, WHOLE, torch.device("cpu"))


def test_a_model_without_data_says_which_options_name_some(tmp_path: Path) -> None:
    (tmp_path / "val/red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val/red/1.png")
    imported, wanted = someone(), r"in all: --data NAME --root FOLDER --split val\)"
    for given, missing in (
        ({}, "--data NAME --root FOLDER --split val"),
        ({"root": tmp_path}, "--data NAME --split val"),
        ({"data": "folder", "root": tmp_path}, "--split val"),
        ({"data": "folder", "root": tmp_path, "split": ""}, "--split val"),
        ({"data": "folder", "split": "val"}, "--root FOLDER"),
    ):
        with pytest.raises(ConfigError, match=rf"models:/m/1 does not say .* say it with {missing} .*{wanted}"):
            subject.open_data(imported, **given)  # type: ignore[arg-type]
    assert len(subject.open_data(imported, "folder", tmp_path, "val")) == 1
    trained = someone(data="folder", root=str(tmp_path), split="val")
    assert len(subject.open_data(trained)) == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta", ""])
def test_a_device_that_is_not_there_is_refused_before_the_model_is_fetched(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' does not exist on this machine; there are auto, cpu"):
        subject.load("models:/m@latest", device=device)


def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device 'cuda' does not exist on this machine; there are auto, cpu$"):
        subject.load("models:/m@latest", device="cuda")


def test_results_that_differ_in_anything_have_folders_of_their_own(tmp_path: Path) -> None:
    data = images(tmp_path)
    other = tmp_path / "other.arrow"
    manifest.write(other, dataclasses.replace(data.heading, digest="1" * 64), ROWS)

    def folder(who: subject.Subject, shown: Manifest, *given: object) -> Path:
        about = wsol.settings(shown, who.view, *given)  # type: ignore[arg-type]
        return wsol.default_folder(who, shown, about)

    one = someone(weights_sha256="a" * 64)
    sharper = dataclasses.replace(one, view=dataclasses.replace(WHOLE, std=(0.5, 0.5, 0.5)))
    first = folder(one, data, PAPER)
    assert first.parent == Path("runs")
    assert first.name.startswith("wsol-m-1-")
    assert folder(someone(weights_sha256="a" * 64), data, PAPER) == first
    others = [
        folder(one, data, OFFICIAL),
        folder(one, data, dataclasses.replace(PAPER, component="contours")),
        folder(one, data, PAPER, 5),
        folder(one, Manifest.open(other, tmp_path), PAPER),
        folder(someone(weights_sha256="b" * 64), data, PAPER),
        folder(sharper, data, PAPER),
    ]
    assert len({first, *others}) == 7
    nameless = [
        dataclasses.replace(one, resolved=Resolved(tmp_path / name / "model", f"runs:/{name}", run_id=name))
        for name in ("r1", "r2")
    ]
    assert [who.slug for who in nameless] == ["r1", "r2"]


def test_settings_that_are_recorded_tell_one_preprocessing_from_another(tmp_path: Path) -> None:
    data = images(tmp_path)
    about = [
        provenance.digest(wsol.settings(data, dataclasses.replace(WHOLE, **changed), PAPER))
        for changed in ({}, {"mean": (0.1, 0.0, 0.0)}, {"std": (0.5, 1.0, 1.0)}, {"padding": 5}, {"eval_crop": 0.5})
    ]
    assert len(set(about)) == 5
