"""Registered models behind a real `mlflow models serve`, and in a real `mlflow models predict`."""

import base64
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from record_server import free_port
from skimage import data as photographs

from pipelines.plan import View
from service import bundle, models, registry, serving, store, tracking
from service.bundle import Card
from service.config import ModelConfig, TrackingConfig

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")


def jpeg(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photographs.astronaut()).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


class Registered:
    """A model in a registry on SQLite, as training leaves it there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"
        store.ensure_ready(self.uri)
        torch.manual_seed(0)
        config = ModelConfig(name="resnet_small", width=16)
        model = models.build(config, 3, 16).eval()
        run = tracking.open_run(TrackingConfig(uri=self.uri, system_metrics=False), name="job", folder=folder / "run")
        run.finish()
        self.card = Card(
            model=config.model_dump(mode="json"),
            classes=CLASSES,
            view=bundle.evaluation_view(View(size=48)),
            num_pretext=16,
            metrics={"val/top1": 0.5},
            run_id=run.run_id,
        )
        registry.write_bundle(folder / "model", model.state_dict(), self.card)
        registry.register(folder / "model", name="demo", run_id=run.run_id, metric="val/top1", tracking_uri=self.uri)
        self.here = serving.Predictor(model, dataclasses.replace(self.card))

    def environment(self) -> dict[str, str]:
        """As in an activated environment."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        ours = {"MLFLOW_TRACKING_URI": self.uri, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
        return kept | ours


class Served(Registered):
    """The same behind `mlflow models serve`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.address = f"http://127.0.0.1:{(port := free_port())}"
        line = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/demo@best"]
        line += ["--env-manager", "local", "--port", str(port)]
        self.log = folder / "serve.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                line, cwd=folder, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"{self.address}/ping", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(0.1)
        raise AssertionError("the server did not start within three minutes")

    def ask(self, body: Any) -> tuple[int, Any]:
        """Status and answer; a `body` of bytes is sent as it is."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/invocations", content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.stop()


def close(found: Any, expected: Any) -> bool:
    return [one["label"] for one in found] == [one["label"] for one in expected] and all(
        mine["probabilities"][name] == pytest.approx(value, abs=1e-6)
        for mine, theirs in zip(found, expected, strict=True)
        for name, value in theirs["probabilities"].items()
    )


def test_images_come_in_as_base64_or_as_pixels_and_probabilities_by_class_name_go_out(server: Served) -> None:
    files = [jpeg(60, 90), jpeg(48, 48), jpeg(130, 70)]
    texts = [base64.b64encode(file).decode() for file in files]
    expected = server.here.predict(pandas.DataFrame({"image": files}))
    assert {name for one in expected for name in one["probabilities"]} == set(CLASSES)
    bodies: list[Any] = [
        {"dataframe_records": [{"image": text} for text in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        {"instances": [{"image": text} for text in texts]},
        {"inputs": {"image": texts}},
    ]
    for body in bodies:
        status, answer = server.ask(body)
        assert status == 200, answer
        assert close(answer["predictions"], expected), list(body)

    pixels = np.asarray(Image.fromarray(photographs.astronaut()).resize((40, 30)))
    expected = server.here.predict(pandas.DataFrame({"pixels": [pixels, pixels[:, ::-1]]}))
    nested = [pixels.tolist(), pixels[:, ::-1].tolist()]
    for body in (
        {"inputs": {"pixels": nested}},
        {"instances": [{"pixels": one} for one in nested]},
        {"dataframe_records": [{"pixels": one} for one in nested]},
    ):
        status, answer = server.ask(body)
        assert status == 200, answer
        assert close(answer["predictions"], expected), list(body)

    status, answer = server.ask({"dataframe_records": [{"image": texts[0]}], "params": {"top": 1}})
    assert (status, len(answer["predictions"][0]["probabilities"])) == (200, 1)


def flat_png(side: int) -> bytes:
    """A black picture, whole and small: what a decoder would make of it has `side`² pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def test_a_bad_request_gets_a_400_that_says_why_and_the_server_goes_on(server: Served) -> None:
    def record(content: bytes) -> dict[str, Any]:
        return {"dataframe_records": [{"image": base64.b64encode(content).decode()}]}

    bomb = flat_png(12_000)
    assert len(bomb) < 100_000
    cases: list[tuple[Any, str]] = [
        (record(b"this is no picture\x00"), "image 0: the file is no image of a known format"),
        (record(jpeg(200, 200)[:2000]), "image 0: the JPEG file is truncated"),
        (record(bomb), "the image declares 12000 x 12000 pixels, more than the 64,000,000 that are taken"),
        (record(b"\xff" * (serving.MOST_BYTES + 1)), "more than the 33,554,432 that are taken"),
        ({"dataframe_records": [{"picture": "x"}]}, "the request has neither column"),
        ({"dataframe_records": [{"image": 3}]}, "image"),
        ({"dataframe_records": [{"image": None}]}, "image"),
        ({"inputs": {"pixels": [[[[0.5, 0.5, 0.5]]]]}}, "not whole numbers of 0 to 255"),
        ({"inputs": {"pixels": [[1, 2], [3]]}}, "pixels"),
        ({"inputs": {"image": ["?"]}}, "image 0"),
        ({"nothing": 1}, "exactly one of the input fields"),
        (b"{", "valid JSON"),
    ]
    for body, complaint in cases:
        status, answer = server.ask(body)
        assert status == 400, (complaint, answer)
        assert complaint in json.dumps(answer), answer
        assert "Traceback" not in answer["message"]
    assert server.ask(record(jpeg(50, 50)))[0] == 200


def test_requests_at_the_same_time_get_their_own_answers(server: Served) -> None:
    files = [jpeg(40 + 7 * number, 64) for number in range(8)]
    expected = [server.here.predict(pandas.DataFrame({"image": [file]})) for file in files]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        text = base64.b64encode(files[number]).decode()
        found[number] = server.ask({"dataframe_records": [{"image": text}]})[1]["predictions"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(found[number], expected[number]) for number in range(len(files)))


@pytest.mark.parametrize("where", ["models:/demo@latest", "a folder"])
def test_the_command_that_predicts_reads_a_file_and_prints_json(server: Served, tmp_path: Path, where: str) -> None:
    file = jpeg(80, 60)
    body = {"dataframe_records": [{"image": base64.b64encode(file).decode()}]}
    (tmp_path / "request.json").write_text(json.dumps(body))
    uri = str(server.folder / "model") if where == "a folder" else where
    line = [sys.executable, "-m", "mlflow", "models", "predict", "-m", uri, "--env-manager", "local"]
    line += ["--input-path", str(tmp_path / "request.json"), "--output-path", str(tmp_path / "answer.json")]
    done = subprocess.run(line, env=server.environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert close(answer["predictions"], server.here.predict(pandas.DataFrame({"image": [file]})))


def test_what_mlflow_leaves_in_the_folder_disturbs_nobody(server: Served) -> None:
    _, card, resolved = registry.load("models:/demo@best", server.uri)
    assert (card.run_id, resolved.version) == (server.card.run_id, 1)
