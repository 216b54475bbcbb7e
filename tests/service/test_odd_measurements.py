"""What a job may write of itself without spoiling the pages and answers that others look at, and how that is shown."""

import base64
import json
import math
import re
import time
from pathlib import Path

import pytest

from service.figures import Series, line_chart, ticks
from service.jobs import keeping
from service.jobs.settings import ServiceSettings
from service.run_folder import parse_metrics
from tests.service.console_service import Service, service
from tests.service.html_page import Page

HUGE = "1" + "0" * 400
DEEP = "[" * 100_000


@pytest.fixture
def here(place: str, tmp_path: Path) -> Service:
    return service(tmp_path)


@pytest.mark.parametrize(
    ("lines", "about"),
    [
        (f'{{"step": {HUGE}, "time_s": 1}}', "{}"),
        (f'{{"step": 5, "time_s": {HUGE}, "train/images_per_s": {HUGE}, "train/lr": {HUGE}}}', "{}"),
        ('{"step": 5, "train/loss": 1e308}\n{"step": 6, "train/loss": -1e308}', "{}"),
        ('{"step": 5, "train/loss": 5e-324}\n{"step": 6, "train/loss": 1e-323}', "{}"),
        ('{"step": 5, "time_s": 1}\n{"step": 6, "time_s": 2}', f'{{"total_steps": {HUGE}}}'),
        ('{"step": 5, "time_s": 1}\n{"step": 6, "time_s": 1e305}', '{"total_steps": 9007199254740992}'),
        ('{"step": -9, "time_s": 2}\n{"step": true, "time_s": 1}', '{"total_steps": 7}'),
        ('{"step": 0, "time_s": 1}', '{"total_steps": 0}'),
        (DEEP, DEEP),
        ('{"step": 5, "train/images_per_s": Infinity, "train/data_wait_share": NaN, "val/top1": NaN}', "[]"),
    ],
)
def test_whatever_a_job_says_of_itself_no_page_of_the_service_falls_over_it(
    here: Service, lines: str, about: str
) -> None:
    job = here.run(here.submit())
    run = here.measured(job, [])
    (run / "metrics.jsonl").write_text(lines + "\n")
    (run / "run.json").write_text(about)
    other = here.submit()
    for path in (
        "/",
        f"/jobs/{job.id}",
        f"/compare?id={job.id}&id={other.id}",
        "/v1/jobs",
        f"/v1/jobs/{job.id}",
        f"/v1/jobs/{job.id}/metrics",
        "/metrics",
    ):
        assert here.client.get(path).status_code == 200, path


def test_of_integers_those_are_measurements_that_a_float_holds() -> None:
    lines = [f'{{"step": 3, "a": {2**53}, "b": {2**53 + 1}, "c": true, "d": 0.5}}', '{"step": false}', DEEP]
    assert parse_metrics(lines) == [{"step": 3, "a": 2**53, "d": 0.5}]


def test_a_cursor_is_refused_whatever_it_holds(here: Service) -> None:
    for content in (DEEP[:5000], f'[{HUGE}, "0"]', "1", '["x", "y"]'):
        cursor = base64.urlsafe_b64encode(content.encode()).decode()
        answer = here.client.get("/", params={"cursor": cursor})
        assert answer.status_code == 400, content[:20]
        assert "take `next` of the page before" in Page(answer.text).shown


def test_an_end_is_read_although_the_jobs_own_word_of_it_is_damaged(here: Service) -> None:
    job = here.run(here.submit(), started_s=time.time() - 60)
    run = here.measured(job, [])
    (run / "error.json").write_text(DEEP)
    settings: ServiceSettings = here.desk.settings
    attempt = here.desk.get(job.id).attempt
    assert attempt is not None
    assert keeping.said(job, attempt, settings) == ""


def test_what_is_not_finite_is_said_to_be_so(here: Service) -> None:
    job = here.run(here.submit())
    records = [{"step": k, "time_s": k, "train/loss": 2.0 if k < 4 else math.nan} for k in range(1, 7)]
    here.measured(job, [*records, {"step": 6, "train/images_per_s": math.inf, "train/data_wait_share": math.nan}])
    page = Page(here.client.get(f"/jobs/{job.id}").text)
    assert "Lossnot finite" in page.shown
    # A speed or a share is no share of anything then.
    assert "Images/s" not in page.shown
    assert "Waits for data" not in page.shown
    (chart,) = (svg["aria-label"] for svg in page.all("svg", role="img"))
    assert chart == "Loss: training, all ends at 2, then it is not finite"
    told = here.client.get(f"/v1/jobs/{job.id}").json()["progress"]
    assert told["metrics"]["train/loss"] is None
    assert "images_per_s" not in told


@pytest.mark.parametrize("last", [math.nan, math.inf, -1e308])
def test_a_curve_that_ends_in_what_cannot_be_drawn_says_so_beside_its_last_point(last: float) -> None:
    chart = line_chart(
        "Loss", [Series("training", [(0, 2.0), (10, 1.0), (20, last)]), Series("other", [(5, 1.0)])], "x"
    )
    assert str(chart).count("then not finite") == 1
    # Beside the last point, which lies half-way up, and clear of it.
    found = re.search(r'y="([\d.]+)"[^>]*>then not finite', str(chart))
    assert found is not None
    assert 100 < float(found[1]) < 150
    first = str(line_chart("Loss", [Series("training", [(0, 2.0), (20, last)])], "x"))
    found = re.search(r'y="([\d.]+)"[^>]*>then not finite', first)
    assert found is not None
    # Not in the legend, which ends at 16.
    assert float(found[1]) > 30
    assert "training ends at 1, then it is not finite, other ends at 1<" in str(chart)
    assert "not finite" not in str(line_chart("Loss", [Series("training", [(0, last), (10, 1.0)])], "x"))


def test_ticks_span_what_is_next_to_nothing() -> None:
    assert json.dumps(ticks(5e-324, 1e-323, 4)) == json.dumps(ticks(0.0, 1.0, 4))
