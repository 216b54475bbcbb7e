"""`lorot plan --measure`: a worker and the link between two are measured, and the plan stands on them."""

from pathlib import Path

import pytest

from service import config
from service.planning import assembly, calibration

pytestmark = pytest.mark.integration


def test_this_machine_is_measured_and_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(
        """
global_batch: 16
micro_batch: 8
device: cpu
data: {name: demo, root: drawn, options: {train_count: 48, val_count: 10, size: 48}, size: 32}
model: {name: resnet_small, width: 16}
"""
    )
    found = calibration.measure("job.yaml", [], 2, steps=3)
    assert found.device == "cpu"
    assert min(found.images_per_s, found.core_s, found.link) > 0
    plan = assembly.assemble(config.load("job.yaml"), assembly.Wish(gpus=2), found)
    # Two workers of this machine: at most twice one, and no more than its cores can do.
    shared = min(2 * found.images_per_s, found.cores / found.core_s)
    assert plan.last.computing == pytest.approx(16 / shared)
    assert plan.last.averaging == pytest.approx(plan.averaged_bytes / (0.8 * found.link))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "job.yaml"]
