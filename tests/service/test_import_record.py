"""What an import leaves behind: a record of how it ended, and a next command that works."""

import shlex
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from travelling import CLASSES, settle

from pipelines.plan import View
from service import bundle, cli, models, recovery, registry, tracking
from service.bundle import Card
from service.config import ModelConfig
from service.errors import LorotError, TrackingError
from service.importing import job
from service.importing.job import Wish

WISH = Wish(classes=",".join(CLASSES), view=View(size=64))


def weights(folder: Path) -> Path:
    torch.manual_seed(0)
    torch.save(settle(models.build(ModelConfig(name="resnet_small", width=16), 5, 0)).state_dict(), folder / "a.pth")
    return folder / "a.pth"


class Server:
    """The database, with tables that can be taken away and brought back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.away = False

    def __call__(self, *tables: str) -> None:
        self.away = not self.away
        with sqlite3.connect(self._path, timeout=20) as database:
            database.execute("PRAGMA legacy_alter_table=ON")
            for table in tables:
                before, after = (table, f"{table}_away") if self.away else (f"{table}_away", table)
                if not self.away:  # MLflow makes an empty one of what it misses
                    database.execute(f"DROP TABLE IF EXISTS {after}")
                database.execute(f"ALTER TABLE {before} RENAME TO {after}")
        database.close()


def at_the_bundle(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Do something when the record is open and the bundle is written, before it is registered."""

    def write(folder: Path, state: Mapping[str, torch.Tensor], card: Card) -> Card:
        written = original(folder, state, card)
        action()
        return written

    original = bundle.write_bundle
    monkeypatch.setattr(bundle, "write_bundle", write)
    monkeypatch.setattr(registry, "_ATTEMPTS", 1)


def the_run() -> Any:
    api = tracking.client()
    (run,) = api.search_runs([api.get_experiment_by_name("lorot").experiment_id])
    return run


def test_a_registration_that_is_refused_is_a_failed_run_and_leaves_no_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights(tmp_path)
    tables = Server(tmp_path / "mlruns" / "mlflow.db")
    at_the_bundle(monkeypatch, lambda: tables("registered_models"))
    with pytest.raises(LorotError):
        job.run(path, "refused", WISH)
    tables("registered_models")
    assert the_run().info.status == "FAILED"
    assert registry.list_models() == []
    assert not Path("runs").exists()


def test_when_the_server_goes_away_the_record_waits_among_the_runs_and_sync_ends_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = weights(tmp_path)
    tables = Server(tmp_path / "mlruns" / "mlflow.db")
    everything = ("registered_models", "runs", "params", "tags", "latest_metrics")
    at_the_bundle(monkeypatch, lambda: tables(*everything))
    with pytest.raises(
        TrackingError, match=r"(?s)nothing is known to be registered: .*\n.* records of this run wait"
    ) as error:
        job.run(path, "half", WISH)
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("import-half-")
    # The whole notice, with what would work.
    assert f"by `lorot sync {folder}`" in str(error.value)
    assert not (folder / "model").exists()
    tables(*everything)
    assert the_run().info.status == "RUNNING"
    with pytest.raises(SystemExit) as ended:
        cli.main(["sync", str(folder)])
    assert not ended.value.code, capsys.readouterr().err
    assert the_run().info.status == "FAILED"
    assert the_run().data.tags["origin.file"] == "a.pth"
    assert recovery.sync(folder).sent == 0


def test_the_next_command_that_is_printed_works(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    random = np.random.default_rng(0)
    for name in CLASSES:
        images, notes = tmp_path / "data" / "val" / name, tmp_path / "data" / "Annotations" / "CLS-LOC" / "val" / name
        images.mkdir(parents=True)
        notes.mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (80, 90, 3), np.uint8)).save(images / "0.png")
        box = "<xmin>10</xmin><ymin>20</ymin><xmax>60</xmax><ymax>70</ymax>"
        (notes / "0.xml").write_text(
            f"<annotation><filename>0</filename><size><width>90</width><height>80</height><depth>3</depth></size>"
            f"<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
        )
    imported = job.run(weights(tmp_path), "m", WISH)
    job.show(imported, Console(width=200))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    command = shlex.split(line.removeprefix("next: ").replace("FOLDER", str(tmp_path / "data")))
    assert command[0] == "lorot"
    with pytest.raises(SystemExit) as ended:
        cli.main(command[1:])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    assert "wsol.gt_known@0.5" in registry.list_models()[0].downstream
    # One that knows its data says no more than the model.
    job.show(replace(imported, card=replace(imported.card, data="folder")), Console(width=200))
    assert "next: lorot wsol --model models:/m/1\n" in capsys.readouterr().out
