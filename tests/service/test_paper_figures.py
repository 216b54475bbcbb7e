"""The paper's figures on models whose answers are known, against slow counts image by image; and from the registry."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.manifold import TSNE
from torch import nn

from pipelines import manifest, pretext
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.plan import View
from service import bundle, provenance, registry, store
from service.bundle import Card, write_bundle
from service.config import ModelConfig, TrackingConfig
from service.downstream import subject
from service.downstream.paper import affinity, cam_grid, embedding, job, pretext_cam
from service.downstream.paper.asking import ImpossibleError, Question
from service.downstream.subject import Subject
from service.errors import ConfigError, DataError
from service.models import Classifier, build
from service.registry import Resolved
from service.tracking import open_run

SIZE = 32
WHOLE = View(size=SIZE, crop="whole", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CLASSES = ("left", "right")


def data_set(root: Path, count: int) -> Manifest:
    """Noise with a white square that has even corners, in the left half (label 0) or in the right one (label 1)."""
    random = np.random.default_rng(4)
    boxes = []
    for index in range(count):
        image = random.integers(0, 60, (SIZE, SIZE, 3)).astype(np.uint8)
        y, x = (2 * random.integers(0, (12, 4))).tolist()
        x += 16 * (index % 2)
        image[y : y + 8, x : x + 8] = 255
        boxes.append([x, y, x + 8, y + 8])
        Image.fromarray(image).save(root / f"{index}.png")
    rows = Rows(
        labels=np.arange(count) % 2,
        heights=np.full(count, SIZE),
        widths=np.full(count, SIZE),
        paths=[f"{index}.png" for index in range(count)],
        box_counts=np.ones(count, int),
        boxes=np.array(boxes, np.float32),
    )
    manifest.write(root / "all.arrow", Heading("halves", "val", CLASSES, CLASSES, "0" * 64, ""), rows)
    return Manifest.open(root / "all.arrow", root)


def half_model() -> Classifier:
    """Features: the brightness of each half, a map of one cell; so it says in which half the square is."""
    conv = nn.Conv2d(3, 2, SIZE, bias=False)
    model = Classifier({"conv": conv}, 2, 2, 0).eval()
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, :, :, : SIZE // 2] = 1.0
        conv.weight[1, :, :, SIZE // 2 :] = 1.0
        model.fc.weight.copy_(torch.eye(2))
        model.fc.bias.zero_()
    return model


def asked(model: Classifier, view: View = WHOLE, **about: object) -> Subject:
    card = Card(model={}, classes=CLASSES, view=bundle.evaluation_view(view), **about)  # type: ignore[arg-type]
    return Subject(model, card, Resolved(Path("known"), "known"), view, torch.device("cpu"))


def question(data: Manifest, *subjects: Subject, **changed: object) -> Question:
    given = {
        "images": 3, "limit": None, "points": 16, "tasks": ("rotation", "lorot_e"), "seed": 5, "batch_size": 7,
        "loader": "torch",
    }  # fmt: skip
    labels = tuple(f"model-{index}" for index in range(len(subjects)))
    return Question(subjects, labels, data, **(given | changed))  # type: ignore[arg-type]


def test_affinity_is_the_ratio_of_two_accuracies_counted_one_by_one(tmp_path: Path) -> None:
    data = data_set(tmp_path, 40)
    drawn = affinity.draw(question(data, asked(half_model())), tmp_path)
    task = pretext.load("rotation")
    _, turns, _ = task.sample(5, 0, np.arange(40), SIZE)
    clean = turned = 0
    for index in range(40):
        image = np.asarray(Image.open(tmp_path / f"{index}.png")).astype(float)
        for pixels, moved in ((image, False), (np.rot90(image, turns[index]), True)):
            answer = int(pixels[:, SIZE // 2 :].sum() > pixels[:, : SIZE // 2].sum())
            clean += not moved and answer == index % 2
            turned += moved and answer == index % 2
    assert clean == 40
    assert 0 < turned < 40
    assert drawn.metrics[0]["rotation"] == pytest.approx(turned / clean)
    # A cell that turns in its own half moves nothing to the other one.
    assert drawn.metrics[0]["lorot_e"] == 1.0
    assert drawn.numbers["models"][0]["accuracy"] == 1.0
    assert Image.open(tmp_path / "affinity.png").size[0] > 300


def test_affinity_of_a_model_that_is_never_right_is_an_error(tmp_path: Path) -> None:
    model = half_model()
    with torch.no_grad():
        model.fc.weight.copy_(torch.eye(2).flip(0))
    with pytest.raises(DataError, match=r"known classifies none of 8 images .* divides by that"):
        affinity.draw(question(data_set(tmp_path, 8), asked(model)), tmp_path)


def test_a_model_that_sees_the_square_covers_it_and_nothing_else(tmp_path: Path) -> None:
    data = data_set(tmp_path, 10)
    pick = nn.Conv2d(3, 2, 2, stride=2, bias=False)
    model = Classifier({"pick": pick, "relu": nn.ReLU()}, 2, 2, 0).eval()
    with torch.no_grad():
        pick.weight.fill_(1.0)
        model.fc.weight.fill_(1.0)
    # A map of 16 x 16 cells of two pixels each, on corners that are even: at half the height it ends where they do.
    drawn = cam_grid.draw(question(data, asked(model), asked(half_model())), tmp_path)
    found, blind = drawn.metrics
    assert (found["coverage"], found["inside"], found["num_located"]) == (1.0, 1.0, 10.0)
    # One cell has no contrast: it lights everything.
    assert (blind["coverage"], blind["top1"]) == (1.0, 1.0)
    assert blind["inside"] == pytest.approx(64 / SIZE**2)
    shown = [one["id"] for one in drawn.numbers["models"][0]["examples"]]
    assert shown == [one["id"] for one in drawn.numbers["models"][1]["examples"]]
    assert len(shown) == 3
    sheet = np.asarray(Image.open(tmp_path / "cam.png"))
    assert sheet.shape[1] > 3 * 168  # the image and two models
    assert sheet.shape[0] > 3 * 168  # three images


@pytest.mark.parametrize("task", ["lorot_e", "lorot_i"])
def test_pretext_answers_and_heat_equal_a_slow_count(task: str, tmp_path: Path) -> None:
    data = data_set(tmp_path, 6)
    torch.manual_seed(0)
    num_labels = pretext.load(task).num_labels
    model = Classifier({"conv": nn.Conv2d(3, 5, 8, stride=8), "relu": nn.ReLU()}, 5, 2, num_labels).eval()
    about = {"pretext": task, "num_pretext": num_labels}
    # All images are shown; pictures and numbers follow the same draws, so the examples are the numbers' parts.
    drawn = pretext_cam.draw(question(data, asked(model, **about), images=6), tmp_path)
    examples = drawn.numbers["models"][0]["examples"]
    assert len(examples) == 24
    assert {one["turns"] for one in examples} == {1, 2, 3}
    inside = []
    for one in examples:
        image = np.asarray(Image.open(tmp_path / f"{one['id']}.png")).astype(np.float32) / 255
        y, x = one["cell"] // 2 * 16, one["cell"] % 2 * 16
        image[y : y + 16, x : x + 16] = np.rot90(image[y : y + 16, x : x + 16], one["turns"]).copy()
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        with torch.no_grad():
            answer = int(model(pixels).pretext_logits.argmax())
            coarse = torch.einsum("chw,c->hw", model.features(pixels)[0], model.pretext_fc.weight[answer])
        heat = nn.functional.interpolate(coarse[None, None], size=SIZE, mode="bilinear")[0, 0].numpy()
        heat = (heat - heat.min()) / np.ptp(heat)
        assert one["predicted"] == answer
        assert one["label"] == (4 * one["cell"] + one["turns"] if task == "lorot_e" else one["turns"])
        assert one["inside"] == pytest.approx(heat[y : y + 16, x : x + 16].sum() / heat.sum(), rel=1e-4)
        inside.append(one["inside"])
    metrics = drawn.metrics[0]
    assert metrics["inside"] == pytest.approx(np.mean(inside))
    assert metrics["accuracy"] == pytest.approx(np.mean([one["predicted"] == one["label"] for one in examples]))
    assert (metrics["num_asked"], metrics["chance"]) == (24.0, 0.25)
    assert drawn.pictures == ("pretext-cam-model-0.png",)
    assert Image.open(tmp_path / drawn.pictures[0]).size[1] > 4 * 168


def test_models_that_predict_no_local_rotation_are_named(tmp_path: Path) -> None:
    data = data_set(tmp_path, 4)
    torch.manual_seed(0)
    turning = Classifier({"conv": nn.Conv2d(3, 5, 8, stride=8)}, 5, 2, 4).eval()
    rotation = asked(turning, pretext="rotation", num_pretext=4)
    with pytest.raises(ImpossibleError, match=r"known \(pretext none\), known \(pretext rotation\); train with"):
        pretext_cam.draw(question(data, asked(half_model()), rotation), tmp_path)
    local = asked(turning, pretext="lorot_i", num_pretext=4)
    drawn = pretext_cam.draw(question(data, rotation, local), tmp_path)
    assert drawn.metrics[0] == {}
    assert "known (pretext rotation)" in drawn.notice


def test_an_embedding_is_scikit_learns_of_pooled_features(tmp_path: Path) -> None:
    data = data_set(tmp_path, 16)
    torch.manual_seed(0)
    model = Classifier({"conv": nn.Conv2d(3, 5, 8, stride=8), "relu": nn.ReLU()}, 5, 2, 0).eval()
    drawn = embedding.draw(question(data, asked(model), tasks=("rotation",)), tmp_path)
    found = drawn.numbers["models"][0]
    _, turns, _ = pretext.load("rotation").sample(5, 0, np.array(found["ids"]), SIZE)
    pixels = [np.asarray(Image.open(tmp_path / f"{one}.png")).astype(np.float32) / 255 for one in found["ids"]]
    turned = [np.rot90(image, turn) for image, turn in zip(pixels, turns, strict=True)]
    with torch.no_grad():
        stacked = torch.from_numpy(np.stack([*pixels, *turned])).permute(0, 3, 1, 2)
        vectors = model.features(stacked).mean(dim=(2, 3)).numpy()
    expected = TSNE(perplexity=31 / 3, init="pca", random_state=5).fit_transform(vectors)
    panel = found["panels"]["rotation"]
    # The embedding amplifies rounding, but neighbours stay: distances within are compared, not places.
    places = np.array(panel["original"] + panel["transformed"])
    assert places.shape == (32, 2)
    ours, theirs = (np.linalg.norm(one - one[0], axis=1) for one in (places, expected))
    assert np.corrcoef(ours, theirs)[0, 1] > 0.95
    assert drawn.metrics[0]["rotation/kl_divergence"] == pytest.approx(panel["kl_divergence"])
    with pytest.raises(ConfigError, match="at least 10 images"):
        embedding.draw(question(data, asked(model), points=9), tmp_path)


def test_without_scikit_learn_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    with pytest.raises(ImpossibleError, match=r"pip install 'lorot\[figures\]'"):
        embedding.draw(question(data_set(tmp_path, 10), asked(half_model())), tmp_path)


def test_a_transformation_that_does_not_fit_is_refused_with_the_models_name(tmp_path: Path) -> None:
    data = data_set(tmp_path, 4)
    odd = asked(half_model(), View(size=33, crop="whole"))
    with pytest.raises(ConfigError, match=r"known sees images of 33 pixels: lorot_e grid 2"):
        question(data, odd).transformations(odd)
    with pytest.raises(ConfigError, match=r"'none' transforms nothing; there are lorot_e, lorot_i, rotation"):
        question(data, odd, tasks=("none",)).transformations(odd)


def registered(tmp_path: Path, name: str, task: str, seed: int) -> None:
    config = ModelConfig(name="resnet_small", width=8)
    num_pretext = pretext.load(task).num_labels
    card = Card(
        model=config.model_dump(mode="json"), classes=CLASSES, view=bundle.evaluation_view(WHOLE), data="halves",
        root="somewhere", split="val", pretext=task, num_pretext=num_pretext, metrics={"val/top1": 0.5},
    )  # fmt: skip
    torch.manual_seed(seed)
    write_bundle(tmp_path / name, build(config, 2, num_pretext).state_dict(), card)
    run = open_run(TrackingConfig(system_metrics=False), name=name, folder=tmp_path / f"run-{name}")
    registry.register(tmp_path / name, name=name, run_id=run.run_id, metric="val/top1")
    run.finish()


def test_figures_of_registered_models_are_recorded_beside_each(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    data = data_set(tmp_path / "images", 12)
    monkeypatch.setattr(subject.datasets, "load", lambda *given, **options: data)
    registered(tmp_path, "plain", "none", 0)
    registered(tmp_path, "turned", "lorot_e", 1)
    models = ["models:/plain@latest", "models:/turned/1"]
    result = job.run(models, output=tmp_path / "out", images=2, loader="torch", tasks=("lorot_e",), points=10)

    assert set(result.files) == {
        "cam.png", "cam.json", "pretext-cam-turned-1.png", "pretext-cam.json", "tsne.png", "tsne.json",
        "affinity.png", "affinity.json",
    }  # fmt: skip
    for name in result.files:
        if name.endswith(".png"):
            assert Image.open(tmp_path / "out" / name).size[0] > 200
        else:
            stored = json.loads((tmp_path / "out" / name).read_text())
            assert (stored["data_digest"], stored["seed"]) == (data.digest, 0)
            assert [view["size"] for view in stored["views"]] == [SIZE, SIZE]
    assert result.titles == ("plain 1", "turned 1")
    assert "pretext-cam/accuracy" not in result.metrics[0]
    assert any("plain 1 (pretext none)" in notice for notice in result.notices)
    for record_id, metrics, name in zip(result.record_ids, result.metrics, ("plain", "turned"), strict=True):
        record = store.client(place).get_run(record_id)
        assert record.data.tags["model.name"] == name
        assert record.data.params["view.mean"] == str(list(WHOLE.mean))
        assert record.data.metrics["figures/affinity/lorot_e"] == pytest.approx(metrics["affinity/lorot_e"])
        paths = {item.path for item in store.client(place).list_artifacts(record_id)}
        assert paths == set(result.files)
    rows = {row.name: row.downstream for row in registry.list_models()}
    assert rows["turned"]["figures.pretext-cam/inside"] == pytest.approx(result.metrics[1]["pretext-cam/inside"])
    assert not any("tsne" in key for key in rows["turned"])

    console = Console(width=120, record=True, file=io.StringIO())
    job.show(result, console)
    assert "affinity/lorot_e" in console.export_text()
    with pytest.raises(ImpossibleError, match="predicts a local rotation"):
        job.run(models[:1], output=tmp_path / "out", kinds=["pretext-cam"], loader="torch")


def test_unknown_figures_and_empty_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are cam, pretext-cam, tsne, affinity"):
        job.run(["models:/m@latest"], output=tmp_path, kinds=["umap"])
    with pytest.raises(ConfigError, match="at least one image"):
        job.run([], output=tmp_path)


def test_settings_that_are_recorded_tell_one_preprocessing_from_another(tmp_path: Path) -> None:
    data = data_set(tmp_path, 2)
    subjects = [asked(half_model(), dataclasses.replace(WHOLE, mean=(mean, 0.0, 0.0))) for mean in (0.0, 0.0, 0.1)]
    about = [provenance.digest(job.settings(question(data, one), ("cam",), (one,))) for one in subjects]
    assert about[0] == about[1] != about[2]


def test_two_models_of_one_name_get_files_of_their_own() -> None:
    subjects = [asked(half_model()) for _ in range(2)]
    assert job.labels(subjects) == ("known-1", "known-2")
