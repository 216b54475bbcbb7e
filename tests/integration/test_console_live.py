"""What is open in a browser while a job goes on, and while the service is slow, away or asked too much."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from service import store
from service.console import compare_pages, job_pages
from service.jobs.job import Attempt, Job
from service.jobs.orders import attempt_folder
from tests.integration import processes
from tests.service.console_service import Service, service
from tests.service.listening import listening

pytestmark = pytest.mark.integration

SIZE = {"width": 1200, "height": 900}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("LOROT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mlruns").mkdir()
    store.ensure_ready(store.default_uri())
    return service(tmp_path)


@pytest.fixture
def running(here: Service) -> Job:
    """A job that has measured something, and written one line."""
    job = here.run(here.submit(), started_s=time.time() - 100)
    here.measured(job, [{"step": 1, "time_s": 1.0, "train/loss": 2.0}])
    here.wrote(job, b"first line\n")
    return job


def write(here: Service, job: Job, text: str) -> None:
    """Let the job go on writing."""
    with (attempt_folder(here.desk.settings, job.id, 1) / "log-node0.txt").open("a") as log:
        log.write(text)


@contextlib.contextmanager
def opened(here: Service, chromium: Browser, path: str) -> Iterator[Page]:
    """A page of the service, which is closed before the service is."""
    with listening(here.app) as url, chromium.new_context(viewport=SIZE) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(url + path)
        yield page


def renewed(page: Page, region: str) -> Callable[[], bool]:
    """Whether another state of a region has been put in place since now."""
    page.evaluate("(id) => { document.getElementById(id).dataset.seen = 'yes'; }", region)
    return lambda: bool(page.evaluate("(id) => !document.getElementById(id).dataset.seen", region))


def test_the_keyboard_stays_where_it_is_while_what_is_around_it_changes(
    here: Service, running: Job, chromium: Browser
) -> None:
    with opened(here, chromium, f"/jobs/{running.id}") as page:
        summary = page.locator("#config summary").first
        for link in (page.locator("#again"), summary):
            link.focus()
            # What it has cost changes every second.
            processes.await_(renewed(page, "about"), "the costs are renewed", 30)
            expect(link).to_be_focused()
        (here.desk.settings.results / running.id / "run" / "config.yaml").write_text("a: 1\n")
        link = page.get_by_role("link", name="config.yaml")
        link.focus()
        for _ in range(2):
            processes.await_(renewed(page, "about"), "the costs are renewed", 30)
            expect(link).to_be_focused()


def test_a_hundred_thousand_lines_at_once_leave_the_last_ones_in_a_page_that_goes_on(
    here: Service, running: Job, chromium: Browser
) -> None:
    with opened(here, chromium, f"/jobs/{running.id}") as page:
        expect(page.locator("#log-note")).to_have_text("Live.")
        page.evaluate(
            """() => {
              window.most = 0;
              window.changes = 0;
              const log = document.getElementById("log");
              new MutationObserver(() => {
                window.changes += 1;
                window.most = Math.max(window.most, log.textContent.split("\\n").length - 1);
              }).observe(log, { childList: true });
            }"""
        )
        write(here, running, "".join(f"line {number} of a program that writes much\n" for number in range(100_000)))
        expect(page.locator("#log")).to_contain_text("line 99999 of")
        # Pieces of 64 kB are put in place, of which the first may be larger than all that is kept.
        assert page.evaluate("window.most") <= 5000 + 2000
        assert page.locator("#log").inner_text().strip().endswith("line 99999 of a program that writes much")
        at_end = "() => { const log = document.getElementById('log'); "
        at_end += "return log.scrollHeight - log.scrollTop - log.clientHeight < 2; }"
        assert page.evaluate(at_end)


def test_lines_that_come_faster_than_they_are_drawn_are_put_in_place_together(
    here: Service, running: Job, chromium: Browser
) -> None:
    with listening(here.app) as url, chromium.new_context(viewport=SIZE) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.add_init_script(
            """window.EventSource = class extends window.EventSource {
              constructor(address) { super(address); window.source = this; }
            };"""
        )
        page.goto(f"{url}/jobs/{running.id}")
        expect(page.locator("#log-note")).to_have_text("Live.")
        # What the service has sent is in place before.
        expect(page.locator("#log > span")).to_have_count(1)
        page.evaluate(
            """() => {
              const log = document.getElementById("log");
              const append = log.append.bind(log);
              window.appended = [];
              log.append = (...all) => { window.appended.push(all.length); append(...all); };
              const come = (number) => new MessageEvent("message", { data: `line ${number}${"\\n.".repeat(9)}` });
              for (let number = 0; number < 600; number += 1) window.source.dispatchEvent(come(number));
            }"""
        )
        expect(page.locator("#log")).to_contain_text("line 599")
        # Ten lines each: the last 5,000.
        assert page.evaluate("window.appended") == [500]


def test_who_has_scrolled_up_to_read_finds_the_same_lines_after_having_looked_elsewhere(
    here: Service, running: Job, chromium: Browser
) -> None:
    write(here, running, "".join(f"line {number}\n" for number in range(150)))
    show = """(hidden) => {
      Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with opened(here, chromium, f"/jobs/{running.id}") as page:
        expect(page.locator("#log")).to_contain_text("line 149")
        page.evaluate("() => { document.getElementById('log').scrollTop = 0; }")
        page.evaluate(show, True)
        write(here, running, "".join(f"line {number}\n" for number in range(150, 400)))
        page.evaluate(show, False)
        expect(page.locator("#log")).to_contain_text("line 399")
        expect(page.locator("#log")).to_contain_text("first line")
        assert page.evaluate("document.getElementById('log').scrollTop") == 0
        # At the end nobody reads, and the connection is given back.
        page.evaluate("() => { const log = document.getElementById('log'); log.scrollTop = log.scrollHeight; }")
        page.evaluate(show, True)
        processes.await_(lambda: here.app.state.meters.streams == 0, "the stream is given back", 30)
        page.evaluate(show, False)
        expect(page.locator("#log")).to_contain_text("line 399")


def test_pages_say_that_the_service_is_away_and_go_on_by_themselves_once_it_is_back(
    here: Service, running: Job, chromium: Browser
) -> None:
    with chromium.new_context(viewport=SIZE) as context:  # type: ignore[arg-type]
        watched, jobs, form = context.new_page(), context.new_page(), context.new_page()
        with listening(here.app, in_order=False) as url:
            for page, path in ((watched, f"/jobs/{running.id}"), (jobs, "/"), (form, "/submit")):
                page.goto(url + path)
            expect(watched.locator("#log-note")).to_have_text("Live.")
            expect(form.locator("#verdict")).to_contain_text("No problem was found")
        for page in (watched, jobs):
            expect(page.locator("#stale")).to_contain_text("The service does not answer since ")
            expect(page.locator("#stale")).to_be_visible()
        expect(watched.locator("#log-note")).to_contain_text("trying again")
        form.get_by_label("Name", exact=True).fill("no name")
        expect(form.locator("#typing")).to_contain_text("It is asked again by itself")
        write(here, running, "meanwhile\n")
        with listening(here.app, int(url.rpartition(":")[2]), in_order=False):
            for page in (watched, jobs):
                expect(page.locator("#stale")).to_be_hidden()
                expect(page.locator("#announce")).to_have_text("The service answers again.")
            expect(watched.locator("#log-note")).to_have_text("Live.")
            expect(watched.locator("#log")).to_have_text("first line\nmeanwhile\n")
            expect(form.locator("#wrong-name")).not_to_be_empty()


def test_a_form_that_is_not_looked_at_any_more_says_why_and_that_its_verdict_is_old(
    here: Service, chromium: Browser
) -> None:
    with opened(here, chromium, "/submit") as page:
        expect(page.locator("#verdict")).to_contain_text("No problem was found")
        stranger = {"origin": "http://elsewhere", "sec-fetch-site": "cross-site"}
        page.route("**/look", lambda route: route.fulfill(response=route.fetch(headers=stranger)))
        page.get_by_label("Name", exact=True).fill("no name")
        expect(page.locator("#typing")).to_contain_text("The service does not look at this form: ")
        expect(page.locator("#typing")).to_contain_text("What was found is from before.")
        page.unroute("**/look")
        page.get_by_label("Name", exact=True).fill("still no name")
        expect(page.locator("#wrong-name")).not_to_be_empty()
        # Refused before it reaches any page.
        page.get_by_label("YAML", exact=True).fill("a" * 2 * here.desk.settings.limits.body_bytes)
        expect(page.locator("#typing")).to_contain_text("look at this form. What was found is from before.")


def test_a_page_whose_job_is_gone_says_so_and_keeps_what_it_shows(
    here: Service, running: Job, chromium: Browser
) -> None:
    with opened(here, chromium, f"/jobs/{running.id}") as page:
        gone = page.url.replace(running.id, "0" * 32)
        page.route(page.url, lambda route: route.fulfill(response=route.fetch(url=gone)))
        expect(page.locator("#stale")).to_contain_text("This page is not renewed any more: there is no job")
        expect(page.locator("#log")).to_contain_text("first line")
        assert page.title() == "demo, running · lorot"


def test_an_empty_log_says_that_there_is_nothing(here: Service, chromium: Browser) -> None:
    waiting = here.submit()
    ended = here.run(here.submit())
    here.wrote(ended, b"")
    here.desk.record.change(ended.id, state="failed", ended_s=time.time())
    with opened(here, chromium, f"/jobs/{ended.id}") as page:
        expect(page.locator("#log-note")).to_have_text("It has written nothing.")
        here.desk.cancel(waiting.id)
        page.goto(page.url.replace(ended.id, waiting.id))
        expect(page.locator("#log-note")).to_have_text("It has not been started.")


def test_one_curve_alone_is_no_larger_than_one_of_several(here: Service, running: Job, chromium: Browser) -> None:
    with opened(here, chromium, f"/jobs/{running.id}") as page:
        expect(page.locator("#curves figure")).to_have_count(1)
        assert page.locator("#curves figure").bounding_box()["width"] < 600  # type: ignore[index]


def test_the_page_of_a_job_that_has_ended_notices_that_somebody_else_has_resumed_it(
    here: Service, running: Job, chromium: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_pages, "_ENDED_S", 1)

    def end(attempt: int) -> None:
        here.desk.record.change(running.id, state="failed", reason=f"end {attempt}", ended_s=time.time())

    def start(*numbers: int) -> None:
        attempts = [Attempt(number, f"lorot-{running.id[:12]}-{number}", {"pid": 812}, 1.0) for number in numbers]
        here.desk.record.change(running.id, state="starting", attempts=tuple(attempts))
        here.desk.record.change(running.id, state="running")

    with opened(here, chromium, f"/jobs/{running.id}") as page:
        expect(page.locator("#log-note")).to_have_text("Live.")
        page.locator("#log-pause").click()
        end(1)
        expect(page.locator("#log-note")).to_contain_text("The job is failed")
        expect(page.locator("#state .reason")).to_have_text("end 1")
        answers: list[int] = []
        page.on("response", lambda response: answers.append(response.status))
        # As long as nothing happens, nothing is sent, and nothing is put in place.
        seen = renewed(page, "about")
        processes.await_(lambda: page.wait_for_timeout(200) or len(answers) > 1, "it is asked again", 60)
        assert set(answers) == {304}
        assert not seen()
        # The job goes on by another door: it waits, and then it runs.
        here.desk.resume(running.id)
        expect(page.locator("#state .head .state")).to_have_text("queued")
        expect(page.locator("#log-note")).to_have_text("Live.")
        expect(page.locator("#log-pause")).to_have_text("Pause")
        expect(page.locator("#log")).to_have_text("first line\n")
        second = attempt_folder(here.desk.settings, running.id, 2)
        second.mkdir()
        (second / "log-node0.txt").write_text("of the second\n")
        start(1, 2)
        expect(page.locator("#state .head .state")).to_have_text("running")
        expect(page.locator("#log")).to_have_text("first line\n--- attempt 2 ---\nof the second\n")
        expect(page.locator("#attempt option")).to_have_text(["1", "2"])
        expect(page.get_by_role("link", name="Whole log")).to_have_attribute("href", re.compile(r"attempt=2"))
        end(2)
        expect(page.locator("#state .reason")).to_have_text("end 2")
        # One that was opened only after the end, and another where an earlier attempt was chosen to be read.
        page.reload()
        expect(page.locator("#log")).to_have_text("of the second\n")
        earlier = page.context.new_page()
        earlier.goto(f"{page.url}?attempt=1")
        here.desk.retry(running.id)
        start(1, 2, 3)
        third = attempt_folder(here.desk.settings, running.id, 3)
        third.mkdir()
        (third / "log-node0.txt").write_text("of the third\n")
        for one in (page, earlier):
            expect(one.locator("#state .head .state")).to_have_text("running")
        expect(page.locator("#log")).to_contain_text("of the third")
        expect(earlier.locator("#attempt option")).to_have_text(["1", "2", "3"])
        expect(earlier.locator("#log")).to_have_text("first line\n")
        expect(earlier.locator("#attempt")).to_have_value("1")


def test_as_many_jobs_side_by_side_as_there_may_be_stay_within_the_page(here: Service, chromium: Browser) -> None:
    jobs = [here.run(here.submit(name=f"{number}-{'long' * 14}")) for number in range(compare_pages.MOST)]
    for job in jobs:
        here.measured(job, [{"step": 1, "time_s": 1.0, "train/loss": 2.0}])
    with opened(here, chromium, "/compare?" + "&".join(f"id={job.id}" for job in jobs)) as page:
        for width in (1200, 720, 375):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
