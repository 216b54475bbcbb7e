"""What every backend is told to run, for every kind of job that `lorot` has a command for."""

from pathlib import Path

import pytest
import typer

from service import cli
from service.jobs import orders
from service.jobs.job import Attempt, Job
from tests.service.job_specs import settings, spec


@pytest.mark.parametrize("kind", ["train", "detect", "segment"])
@pytest.mark.parametrize(
    ("backend", "nodes"), [("local", "1"), ("docker", "1"), ("docker", "2"), ("kubernetes", "1:2")]
)
def test_a_job_of_any_kind_is_ordered_anywhere_by_a_line_that_the_command_takes(
    tmp_path: Path, kind: str, backend: str, nodes: str
) -> None:
    model = None if kind == "train" else "models:/small@best"
    own = spec(kind=kind, model=model, backend=backend, nodes=nodes, workers=2)
    job = Job("ab" * 16, "1", own, "starting", resume=True)
    chosen = settings(tmp_path, tracking_uri="http://mlflow:5000")
    order = orders.order(job, Attempt(2, "lorot-abababababab-2"), chosen, {})
    line = order.command[order.command.index(kind) + 1 :]
    taken = typer.main.get_command(cli.app).commands[kind].make_context(kind, list(line)).params
    folder = "/job" if backend != "local" else f"{tmp_path}/jobs/{job.id}"
    expected = {"config": Path(folder) / "job.yaml", "model": model, "workers": 2, "resume": True, "max_restarts": 3}
    if nodes != "1":
        expected |= {"nnodes": nodes, "rdzv": orders.RENDEZVOUS, "run_id": "lorot-abababababab-2"}
    assert {key: value for key, value in taken.items() if value} == {k: v for k, v in expected.items() if v}
