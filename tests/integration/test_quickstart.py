"""The whole chain from nothing, as a newcomer starts it, only smaller: every part is the real one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service import registry

ROOT = Path(__file__).parents[2]
SMALLER = [
    "duration=6 steps",
    "evaluate_every=6 steps",
    "global_batch=32",
    "micro_batch=16",
    "tracking.log_every=2 steps",
    "model.width=16",
    "data.size=32",
    "data.options={train_count: 96, val_count: 40, size: 48}",
]


@pytest.mark.integration
def test_the_quickstart_goes_from_nothing_to_a_report_by_way_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    line = [sys.executable, "-m", "service.cli", "quickstart", *SMALLER]
    for attempt in range(2):
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        # What libraries print belongs into the log file; a second attempt sets the first one's folder aside.
        assert done.stderr == ""
        assert re.search(r"deepspeed|mlflow\.store|warning|alembic|\[INFO\]", done.stdout, re.IGNORECASE) is None
        assert f"models:/lorot-demo/{attempt + 1}" in done.stdout
    assert "top-1" in done.stdout
    assert "the best centre box" in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"(?:src|href)=[\"']?https?:", page) == []
    assert (tmp_path / "runs/quickstart.1/summary.json").exists()
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    model, card, found = registry.load("models:/lorot-demo@latest")
    assert (found.version, card.run_id) == (2, summary["run_id"])
    assert card.pretext == "lorot_e"
    assert model.fc.out_features == 10
    downstream = registry.list_models()[0].downstream
    assert any(name.startswith("wsol.") for name in downstream)
