"""Jobs side by side in the console: chosen in the list, what differs, what came out, curves over one another."""

import re
from pathlib import Path

import pytest

from service import figures
from service.console import compare_pages
from service.jobs import shown
from service.jobs.job import Job
from tests.service.console_service import TINY, Service, service
from tests.service.html_page import Page


@pytest.fixture
def here(place: str, tmp_path: Path) -> Service:
    return service(tmp_path)


def two(here: Service) -> list[Job]:
    """Two jobs that differ in seed and name, and have measured: the second is better at last, the first was once."""
    jobs = []
    for number, losses in enumerate([(2.0, 0.5, 0.9), (2.0, 1.5, 0.7)]):
        job = here.run(here.submit(name=f"run-{number}", config={**TINY, "seed": number}, priority=number))
        rows = [{"step": 10 * k, "time_s": k, "train/loss": loss} for k, loss in enumerate(losses, 1)]
        here.measured(job, [*rows, {"step": 30, "time_s": 3, "val/top1": 0.5 + 0.25 * number, "train/lr": 0.1}])
        jobs.append(job)
    return jobs


def get(here: Service, path: str) -> Page:
    answer = here.client.get(path)
    assert answer.status_code == 200, answer.text
    return Page(answer.text)


def cells(page: Page, table: str) -> dict[str, list[str]]:
    """Row -> what is in its cells."""
    text = re.search(rf'<table[^>]*id="{table}".*?</table>', page.source, re.DOTALL)
    assert text is not None
    rows = re.findall(r'<th scope="row"[^>]*>(.*?)</th>(.*?)</tr>', text[0], re.DOTALL)
    return {
        head: [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
        ]
        for head, row in rows
    }


def test_the_list_is_a_form_that_leads_to_the_comparison_without_a_script(here: Service) -> None:
    jobs = two(here)
    page = get(here, "/")
    (form,) = page.all("form", id="comparison")
    assert (form["action"], form["method"]) == ("/compare", "get")
    boxes = page.all("input", type="checkbox", form="comparison", name="id")
    assert {box["value"] for box in boxes} == {job.id for job in jobs}
    assert len({box["aria-label"] for box in boxes}) == 2


def test_one_job_alone_is_not_there_to_be_compared(here: Service) -> None:
    here.submit()
    page = get(here, "/")
    assert not page.all("form", id="comparison")
    assert not page.all("input", type="checkbox")


def test_what_differs_and_what_came_out_stand_side_by_side(here: Service) -> None:
    first, second = two(here)
    page = get(here, f"/compare?id={first.id}&id={second.id}")
    assert cells(page, "settings") == {
        "name": ["run-0", "run-1"],
        "config.seed": ["0", "1"],
        "priority": ["0", "1"],
    }
    assert cells(page, "metrics") == {
        # Of losses less is better, of accuracies more; of a learning rate nobody can say.
        "train/loss": ["0.9 best 0.5", "0.7 best 0.7"],
        "val/top1": ["50.0% best 50.0%", "75.0% best 75.0%"],
        "train/lr": ["0.1", "0.1"],
    }
    leading = re.findall(r'<b class="good">best ([^<]+)</b>', page.source)
    assert sorted(leading) == ["0.5", "75.0%"]


def test_each_metric_is_one_chart_with_a_curve_of_each_job_in_its_colour_and_dashes(here: Service) -> None:
    first, second = two(here)
    third = here.run(here.submit(name="none-yet"))
    page = get(here, f"/compare?id={third.id}&id={first.id}&id={second.id}")
    charts = dict(re.findall(r"<h3>([^<]+)</h3>(<svg.*?</svg>)", page.source, re.DOTALL))
    assert set(charts) == {"Loss, training, all", "Top-1 accuracy, held-out", "Learning rate"}
    for chart in charts.values():
        # The first has measured nothing, and leaves its colour to nobody.
        assert re.findall(r'<polyline class="(s\d) curve"', chart) == ["s1", "s2"]
        # And differ without their colours.
        assert len(set(re.findall(r'<polyline [^>]*stroke-dasharray="([^"]+)"', chart))) == 2
    assert "2 ends at 0.9, 3 ends at 0.7" in charts["Loss, training, all"]
    # Beside each job stands what its curves look like, in each table.
    for number in range(3):
        assert page.source.count(str(figures.swatch(number))) == page.source.count("<table")
    # The same points as on the page of the job itself.
    own = re.search(r"<h3>Loss</h3>(<svg.*?</svg>)", get(here, f"/jobs/{first.id}").source, re.DOTALL)
    assert own is not None
    assert "training, all ends at 0.9" in own[1]


def test_fewer_than_two_jobs_ask_for_another_and_a_wrong_id_is_told(here: Service) -> None:
    first, second = two(here)
    assert "No job was chosen" in get(here, "/compare").shown
    alone = get(here, f"/compare?id={first.id}&id=")
    assert "name another" in alone.shown
    assert alone.all("input", name="id", type="hidden")[0]["value"] == first.id
    # As many digits as tell it from others, as it is typed; and each job once.
    page = get(here, f"/compare?id={first.id}&id=+{second.id[:12]}+&id={second.id}&id=ffffffffffff")
    assert "there is no job &#39;ffffffffffff&#39;" in page.source
    assert len(page.all("input", name="id", type="hidden")) == 2
    leave = [link["href"] for link in page.all("a") if "Leave" in link.attributes.get("aria-label", "")]
    assert leave == [f"/compare?id={second.id}&", f"/compare?id={first.id}&"]


def test_no_more_jobs_are_compared_than_there_are_colours(here: Service) -> None:
    jobs = [here.submit(name=f"run-{number}") for number in range(compare_pages.MOST + 2)]
    page = get(here, "/compare?" + "&".join(f"id={job.id}" for job in jobs))
    assert "6 jobs at most are compared here" in page.shown
    assert "run-5" in page.shown
    assert "run-6" not in page.shown
    assert not page.all("form", id="another")
    assert page.shown.count("6 jobs at most") == 1
    style = (Path(compare_pages.__file__).parent / "static/console.css").read_text()
    for number in range(compare_pages.MOST):
        # Light and dark.
        assert len(re.findall(rf"--s{number}: #", style)) == 2
        assert f".s{number} {{" in style


def test_however_many_ids_an_address_holds_few_are_looked_for(here: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, get_job = [], here.desk.get
    monkeypatch.setattr(here.desk, "get", lambda job_id: looked.append(job_id) or get_job(job_id))
    page = get(here, "/compare?" + "&".join(f"id={number:06x}" for number in range(2000)))
    assert "6 jobs at most are compared here" in page.shown
    assert looked == [f"{number:06x}" for number in range(compare_pages.MOST)]


def test_text_from_outside_is_escaped_there_too(here: Service) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    jobs = [here.submit(experiment=note) for note in (hostile, "plain")]
    page = get(here, "/compare?" + "&".join(f"id={job.id}" for job in jobs))
    assert hostile not in page.source
    assert "&lt;img src=x" in page.source


def test_who_is_not_known_is_led_to_the_login_and_back_to_the_comparison(here: Service) -> None:
    job = here.submit()
    here.access.tokens.create("ann", "read")
    answer = here.client.get(f"/compare?id={job.id}")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next=%2Fcompare%3Fid%3D{job.id}")
    assert here.log_in("ben", "read").get(f"/compare?id={job.id}").status_code == 200


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *(("train/loss", min), ("val/class_loss", min), ("val/top1", max), ("val/AP50", max)),
        *(("train/pretext_accuracy", max), ("train/images_per_s", max), ("wsol/gt_known:0.5", max)),
        *(("train/lr", None), ("train/data_wait_share", None), ("epoch", None)),
    ],
)
def test_it_is_known_of_metrics_which_way_is_better(name: str, which: object) -> None:
    assert shown.better(name) is which
