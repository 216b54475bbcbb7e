"""Jobs side by side by what they were resolved to: the same by every door, and said where it is not known."""

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from service import store
from service.api import questions
from service.commands import job_tables
from service.errors import TrackingError
from service.jobs import job_tags, runs, shown
from service.jobs.job import Job
from service.jobs.spec import JobSpec
from tests.service.console_service import TINY, Service, service
from tests.service.test_console_compare import cells, get


@pytest.fixture
def here(place: str, tmp_path: Path) -> Service:
    return service(tmp_path)


def submitted(here: Service, section: str = "optimizer", **values: Any) -> Job:
    config = copy.deepcopy(TINY)
    if values:
        config[section] = values
    return here.submit(config=config)


def unrecorded(here: Service, **values: Any) -> Job:
    """As a version has left it that did not record what jobs are resolved to."""
    config = {**TINY, **({"optimizer": values} if values else {})}
    return here.desk.record.create(JobSpec.model_validate({"name": "demo", "config": config}), owner="local")[0]


def compared(here: Service, *jobs: Job) -> dict[str, Any]:
    """By the API, which says what the desk says."""
    ids = [job.id for job in jobs]
    found: dict[str, Any] = here.client.get("/v1/jobs/compare", params={"id": ids}).json()
    assert found == here.desk.compare(ids)
    return found


def on_the_page(here: Service, *jobs: Job) -> dict[str, list[str]]:
    return cells(get(here, "/compare?" + "&".join(f"id={job.id}" for job in jobs)), "settings")


def on_a_terminal(found: dict[str, Any]) -> str:
    out = io.StringIO()
    job_tables.show_compared(found, Console(file=out, width=200))
    return out.getvalue()


def test_a_default_is_compared_by_its_value_and_is_the_same_written_out(here: Service) -> None:
    plain, written, other = submitted(here), submitted(here, lr=0.1), submitted(here, lr=0.3)
    found = compared(here, plain, written, other)
    assert found["configurations"] == ["resolved"] * 3
    assert found["settings"] == {"config.optimizer.lr": ["0.1", "0.1", "0.3"]}
    assert compared(here, plain, written)["settings"] == {}
    assert on_the_page(here, plain, other) == {"config.optimizer.lr": ["0.1", "0.3"]}
    assert re.search(r"config\.optimizer\.lr +0\.1 +0\.1 +0\.3 *\n", on_a_terminal(found))
    page = get(here, f"/compare?id={plain.id}&id={written.id}")
    assert "None: they have the same settings." in page.shown


def test_what_only_one_kind_of_them_has_is_not_set_in_the_other(here: Service) -> None:
    faded = submitted(here, "ema", decay=0.9)
    row = on_the_page(here, submitted(here), faded)
    assert row["config.ema"] == ["null", "not set"]
    assert row["config.ema.decay"] == ["not set", "0.9"]


def test_where_it_was_not_recorded_this_is_said_and_what_was_asked_for_is_compared(here: Service) -> None:
    plain, low, high = submitted(here), submitted(here, lr=0.05), submitted(here, lr=0.3)
    old, old_low = unrecorded(here), unrecorded(here, lr=0.05)
    found = compared(here, high, old)
    assert found["configurations"] == ["resolved", "not recorded"]
    # Nothing is said of the eighty settings that neither was given.
    assert found["settings"] == {"config.optimizer.lr": ["0.3", None]}
    assert on_the_page(here, high, old) == {"config.optimizer.lr": ["0.3", "not recorded"]}
    assert compared(here, low, old_low)["settings"] == {}
    assert compared(here, plain, old)["settings"] == {}
    assert compared(here, plain, old_low)["settings"] == {"config.optimizer.lr": ["0.1", "0.05"]}
    told = on_a_terminal(found)
    assert re.search(r"config\.optimizer\.lr +0\.3 +not recorded *\n", told)
    caveat = f"demo ({old.id[:12]}): it is not recorded what it was resolved to"
    assert caveat in told
    assert caveat in get(here, f"/compare?id={plain.id}&id={old.id}").shown
    assert high.id[:12] not in "".join(shown.caveats(found))


def test_what_somebody_has_changed_in_the_record_counts_as_not_recorded(here: Service) -> None:
    one, other = submitted(here), submitted(here, lr=0.3)
    store.client(here.desk.record.uri).set_tag(one.id, next(iter(job_tags.encode_config({"a": 1}))), "{")
    assert compared(here, one, other)["configurations"] == ["not recorded", "resolved"]


def test_a_container_has_no_configuration_and_needs_none(here: Service) -> None:
    fields = {"kind": "container", "backend": "docker", "image": "image:1", "command": ["true"]}
    other = here.desk.record.create(JobSpec.model_validate({"name": "demo", **fields}), owner="local")[0]
    job = submitted(here, lr=0.3)
    found = compared(here, job, other)
    assert found["configurations"] == ["resolved", "no configuration"]
    assert found["settings"]["kind"] == ["train", "container"]
    assert on_the_page(here, job, other)["config.optimizer.lr"] == ["0.3", "no configuration"]
    # Of all that the other has, only what was asked for.
    assert "config.optimizer.momentum" not in found["settings"]
    assert shown.caveats(found) == []


def test_however_many_are_compared_mlflow_is_asked_once(here: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [submitted(here, lr=0.1 * number) for number in range(1, 5)]
    client, asked = store.client, []

    class Counting:
        def __init__(self, uri: str | None = None) -> None:
            self._real = client(uri)

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(self._real, name)

    monkeypatch.setattr(runs.store, "client", Counting)
    found = here.desk.configurations(jobs)
    assert asked == ["search_runs"]
    assert [found[job.id]["optimizer"]["lr"] for job in jobs] == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("is_slow", [False, True], ids=["refused", "without-an-answer"])
def test_where_mlflow_does_not_answer_jobs_are_compared_by_what_was_asked_for(
    here: Service, monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    plain, other = submitted(here), submitted(here, lr=0.3)
    # What was measured comes from the jobs' own folders.
    for job in (plain, other):
        here.measured(here.run(job), [{"step": 1, "time_s": 1.0, "train/loss": 2.0}])

    def fail(uri: str, jobs: list[Job]) -> dict[str, Any]:
        if is_slow:
            raise TimeoutError
        raise TrackingError("no answer")

    def within(timeout_s: float, ask: Any) -> Any:
        try:
            return ask()
        except TimeoutError:
            raise TimeoutError from None

    monkeypatch.setattr(runs, "configurations", fail)
    monkeypatch.setattr(questions.store, "within", within)
    found = here.client.get("/v1/jobs/compare", params={"id": [plain.id, other.id]}).json()
    assert found["configurations"] == ["not known now"] * 2
    assert found["settings"] == {"config.optimizer.lr": [None, "0.3"]}
    assert on_the_page(here, plain, other) == {"config.optimizer.lr": ["not known now", "0.3"]}
    page = get(here, f"/compare?id={plain.id}&id={other.id}")
    assert "MLflow does not say just now what it was resolved to" in page.shown
