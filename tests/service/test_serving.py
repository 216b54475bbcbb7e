"""A registered model as MLflow's tools see it: it answers as an evaluation does, and believes no request."""

import base64
import dataclasses
import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from PIL import Image
from skimage import data as photographs
from small_model import CARD, network, written
from travelling import settle

from pipelines import datasets, loading, pretext
from pipelines.plan import View
from service import bundle, registry, serving
from service.flavour import mlmodel

SIZES = ((200, 150), (97, 240), (64, 64), (32, 32), (301, 300), (50, 33))


def photograph(height: int, width: int) -> Image.Image:
    """A part of a photograph, another one for each size."""
    sources = (photographs.astronaut, photographs.coffee, photographs.chelsea, photographs.rocket)
    whole = Image.fromarray(sources[(height + width) % 4]())
    y, x = 7 * height % (whole.height // 2), 5 * width % (whole.width // 2)
    part = whole.crop((x, y, x + whole.width // 2, y + whole.height // 2))
    return part.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(height: int = 60, width: int = 80, **options: Any) -> bytes:
    file = io.BytesIO()
    photograph(height, width).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files in a class folder: of several sizes, one grey, one turned by its EXIF."""
    root = tmp_path_factory.mktemp("jpegs")
    folder = root / "val" / "astronaut"
    folder.mkdir(parents=True)
    for number, size in enumerate(SIZES):
        (folder / f"{number}.jpg").write_bytes(jpeg(*size))
    photograph(80, 120).convert("L").save(folder / "grey.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "turned.jpg").write_bytes(jpeg(90, 140, exif=turned))
    return root


def served(tmp_path: Path, view: View | None = None) -> Any:
    card = dataclasses.replace(CARD, view=bundle.evaluation_view(view or View(size=32)))
    bundle.write_bundle(tmp_path / "model", settle(network()).state_dict(), card)
    return pyfunc.load_model(str(tmp_path / "model"))


def probabilities(answers: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([[one["probabilities"][name] for name in CARD.classes] for one in answers])


@pytest.mark.parametrize(
    "view",
    [
        View(size=32),
        View(size=48, crop="whole", mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1)),
        View(size=32, eval_crop=1.0, eval_size=40),
    ],
    ids=["centre", "whole", "larger"],
)
@pytest.mark.parametrize(("loader", "tolerance"), [("torch", 1e-6), ("dali", 2e-3)])
def test_probabilities_are_those_of_an_evaluation_of_the_same_files(
    tmp_path: Path, jpegs: Path, view: View, loader: str, tolerance: float
) -> None:
    model = served(tmp_path, view)
    manifest = datasets.load("folder", jpegs, "val")
    files = [manifest.read(row) for row in range(len(manifest))]
    with loading.open_eval(
        loader, loading.Source(manifest, view, pretext.load("none"), seed=0), batch_size=3, num_threads=1
    ) as batches:
        # The last batch is filled up with what does not count.
        real = [(batch.ids[batch.valid], batch.images[batch.valid]) for batch in batches]
    seen = {int(id): image for ids, images in real for id, image in zip(ids, images, strict=True)}
    with torch.inference_mode():
        expected = settle(network())(torch.stack([seen[row] for row in range(len(files))])).logits.softmax(1)
    found = probabilities(model.predict(pandas.DataFrame({"image": files})))
    assert found.shape == (len(SIZES) + 2, 3)
    assert (found - expected).abs().max() <= tolerance
    # The images are told apart at all.
    assert torch.pdist(expected).median() > 20 * tolerance


def test_bytes_base64_and_pixels_of_one_image_get_one_answer(tmp_path: Path) -> None:
    model = served(tmp_path)
    file = io.BytesIO()
    photograph(40, 70).save(file, "PNG")
    content = file.getvalue()
    pixels = np.asarray(photograph(40, 70))
    text = base64.b64encode(content).decode()
    requests: list[Any] = [
        pandas.DataFrame({"image": [content]}),
        pandas.DataFrame({"image": [text.encode()]}),
        pandas.DataFrame({"image": ["\n".join(text[at : at + 76] for at in range(0, len(text), 76))]}),
        pandas.DataFrame({"pixels": [pixels.tolist()]}),
        pandas.DataFrame({"pixels": [pixels]}),
        {"pixels": pixels[None]},
    ]
    answers = [model.predict(request) for request in requests]
    assert answers == [answers[0]] * len(requests)
    (answer,) = answers[0]
    assert answer["probability"] == max(answer["probabilities"].values())
    assert answer["label"] == next(iter(answer["probabilities"]))
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-12)


def test_many_images_are_answered_in_order_whatever_the_batch_they_fall_in(tmp_path: Path) -> None:
    model = served(tmp_path)
    files = [jpeg(40 + row, 50) for row in range(serving._BATCH + 3)]
    together = probabilities(model.predict(pandas.DataFrame({"image": files})))
    alone = torch.cat([probabilities(model.predict(pandas.DataFrame({"image": [file]}))) for file in files])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert len(together.unique(dim=0)) == len(files)


def test_top_names_only_the_most_probable_classes(tmp_path: Path) -> None:
    model = served(tmp_path)
    request = pandas.DataFrame({"image": [jpeg()]})
    (whole,) = model.predict(request)
    (two,) = model.predict(request, params={"top": 2})
    assert list(two["probabilities"].items()) == list(whole["probabilities"].items())[:2]
    assert len(model.predict(request, params={"top": 99})[0]["probabilities"]) == 3
    with pytest.raises(MlflowException, match="top: -1 is no number of classes"):
        model.predict(request, params={"top": -1})


def garbled() -> bytes:
    """A whole PNG file whose compressed pixels are not."""
    file = io.BytesIO()
    photograph(64, 64).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[200:400] = bytes(200)
    return bytes(content)


def png(width: int, height: int) -> bytes:
    """A PNG file that declares any size, and holds one black row."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BAD: list[tuple[str, dict[str, list[Any]], str]] = [
    ("no column", {"picture": [b"x"]}, "the request has neither column; send one column"),
    ("both columns", {"image": [jpeg()], "pixels": [[[[0, 0, 0]]]]}, "the request has image and pixels"),
    ("no image", {"image": [jpeg(), b"hello, world\x00"]}, "image 1: the file is no image of a known format"),
    ("empty", {"image": [b""]}, "image 0: the file is empty"),
    ("a number", {"image": [3]}, "Incompatible input types for column image"),
    ("nothing", {"image": [None]}, "image 0: NoneType is no image"),
    ("bad base64", {"image": ["AAAAA"]}, "image 0: neither an image nor base64 of one"),
    ("base64 of none", {"image": [base64.b64encode(b"plain text")]}, "no image of a known format"),
    ("cut JPEG", {"image": [jpeg(200, 200)[:3000]]}, "image 0: the JPEG file is truncated"),
    ("damaged PNG", {"image": [garbled()]}, "image 0: the file is damaged"),
    ("a bomb", {"image": [png(60_000, 60_000)]}, "declares 60000 x 60000 pixels, more than the 64,000,000"),
    ("flat pixels", {"pixels": [[1, 2, 3]]}, r"pixels of shape \(3,\)"),
    ("four channels", {"pixels": [np.zeros((4, 4, 4)).tolist()]}, r"pixels of shape \(4, 4, 4\)"),
    ("no pixels", {"pixels": [np.zeros((0, 4, 3))]}, r"pixels of shape \(0, 4, 3\)"),
    ("ragged", {"pixels": [[[[0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]]}, "pixels are no array"),
    ("texts", {"pixels": [[[["a", "b", "c"]]]]}, "pixels are no array"),
    ("normalised", {"pixels": [[[[0.1, 0.2, 0.3]]]]}, "not whole numbers of 0 to 255"),
    ("negative", {"pixels": [[[[-1, 0, 0]]]]}, "not whole numbers of 0 to 255"),
    ("NaN", {"pixels": [[[[float("nan"), 0, 0]]]]}, "not whole numbers of 0 to 255"),
    ("too many", {"image": [b"x"] * (serving.MOST_IMAGES + 1)}, "1025 images, more than 1024"),
]


@pytest.mark.parametrize(("columns", "complaint"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_request_is_a_bad_request(tmp_path: Path, columns: dict[str, list[Any]], complaint: str) -> None:
    with pytest.raises(MlflowException, match=complaint) as caught:
        served(tmp_path).predict(pandas.DataFrame(columns))
    assert caught.value.get_http_status_code() == 400


def test_a_file_above_the_limit_is_refused_and_long_rubbish_costs_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(tmp_path)
    began = time.process_time()
    with pytest.raises(MlflowException, match="no image of a known format"):
        model.predict(pandas.DataFrame({"image": [b" " * 5_000_000 + b"\xff"]}))
    # Of this process alone: the machine may have other work.
    assert time.process_time() - began < 2
    monkeypatch.setattr(serving, "MOST_BYTES", 1000)
    with pytest.raises(MlflowException, match="more than the 1,000 that are taken"):
        model.predict(pandas.DataFrame({"image": [jpeg(200, 200)]}))


def test_the_signature_is_the_one_that_mlflow_reads_and_writes_itself(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", dataclasses.replace(CARD, run_id="abc"))
    model = Model.load(str(folder))
    assert model.run_id == "abc"
    assert model.flavors["python_function"]["loader_module"] == "service.serving"
    assert model.signature is not None
    assert [(column.name, column.required) for column in model.signature.inputs.inputs] == [
        ("image", False),
        ("pixels", False),
    ]
    assert model.signature.outputs.input_names() == ["label", "probability", "probabilities"]
    assert [param.name for param in model.signature.params.params] == ["top"]
    assert type(model.signature).from_dict(model.signature.to_dict()) == model.signature
    assert Model.from_dict(model.to_dict()) == model
    # Nobody finds a pickle or code in it.
    assert sorted(path.name for path in folder.iterdir()) == ["MLmodel", "model.json", "model.safetensors"]


def test_a_model_without_the_file_which_older_versions_wrote_is_loaded_as_before(tmp_path: Path) -> None:
    folder = written(tmp_path / "model")
    card = (folder / "model.json").read_text()
    assert '"origin": {}' in card
    (folder / "model.json").write_text(card.replace(',\n "origin": {}', ""))
    (folder / "MLmodel").unlink()
    model, read, _ = registry.load(str(folder))
    assert read.origin == {}
    assert torch.equal(model.fc.weight, network().fc.weight)


def test_writing_the_file_takes_no_time() -> None:
    took = []
    for number in range(5):
        began = time.thread_time()
        mlmodel("a" * 64, f"run {number}")
        took.append(time.thread_time() - began)
    assert min(took) < 0.05


def test_class_names_that_stand_twice_keep_both_their_probabilities() -> None:
    assert serving.named_once(("crane", "dog", "crane")) == ("crane (0)", "dog", "crane (2)")
    card = dataclasses.replace(CARD, classes=("crane", "dog", "crane"))
    (answer,) = serving.Predictor(network(), card).predict(pandas.DataFrame({"image": [jpeg()]}))
    assert set(answer["probabilities"]) == {"crane (0)", "dog", "crane (2)"}


def test_a_request_of_too_many_pixels_is_refused_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(tmp_path)
    monkeypatch.setattr(serving, "sound", lambda *given: pytest.fail("it was looked at"))
    for columns in ({"image": [png(8000, 8000)] * 16}, {"image": [jpeg(), *[png(8000, 8000)] * 16]}):
        with pytest.raises(
            MlflowException, match="pixels together, more than the 1,000,000,000 that are taken"
        ) as caught:
            model.predict(pandas.DataFrame(columns))
        assert caught.value.get_http_status_code() == 400
    monkeypatch.setattr(serving, "MOST_PIXELS_TOGETHER", 31)
    with pytest.raises(MlflowException, match="32 pixels together"):
        model.predict(pandas.DataFrame({"pixels": [np.zeros((4, 4, 3))] * 2}))


def test_want_of_memory_and_mistakes_of_ours_are_not_said_to_be_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = serving.Predictor(network(), CARD)
    request = pandas.DataFrame({"image": [jpeg()]})
    for step, error in ((serving.torch_reference, MemoryError), (serving, ZeroDivisionError)):

        def fails(*given: Any, error: type[Exception] = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(step, "render_batch" if step is serving.torch_reference else "eval_plan", fails)
            with pytest.raises(error):
                predictor.predict(request)
