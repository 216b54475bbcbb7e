"""The console in a real browser, against a real service: from the form to the registered model, for everybody."""

import contextlib
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from playwright.sync_api import TimeoutError as LateError

from tests.integration import browser as browsing
from tests.integration import processes
from tests.integration.browser import Walker, Watched
from tests.integration.live_console import Console

pytestmark = pytest.mark.integration

CONFIG = """\
duration: 24 steps
evaluate_every: 8 steps
global_batch: 8
micro_batch: 8
workers: 1
device: cpu
precision: fp32
data:
  name: demo
  root: {root}/data/demo
  options: {{train_count: 64, val_count: 16, size: 40}}
  size: 32
  eval_crop: 1.0
  loader: torch
pretext: {{name: lorot_e}}
objective: {{name: multi_task}}
model: {{name: resnet_small, width: 8}}
optimizer: {{lr: 0.05}}
checkpoint: {{every: 8 steps}}
tracking: {{log_every: 2 steps, system_metrics: false}}
registry: {{name: console-demo}}
"""


def paths(console: Console) -> list[str]:
    return [
        "/",
        f"/jobs/{console.failed}",
        f"/jobs/{console.finished}",
        f"/compare?id={console.failed}&id={console.finished}",
        "/models",
        "/models/lorot-earlier",
        "/models/lorot-earlier/1",
        "/submit",
        "/login",
        "/jobs/000000",
    ]


def test_a_job_is_submitted_watched_to_its_end_and_its_model_opened(
    console: Console, chromium: Browser, pictures: Path
) -> None:
    with chromium.new_context(viewport={"width": 1200, "height": 900}) as context:
        watched = Watched(context, console.url)
        page = watched.open("/")
        page.get_by_role("link", name="Submit a job").click()
        page.get_by_label("Configuration", exact=True).select_option("")
        text = CONFIG.format(root=console.root)
        # Checked while it is typed: nothing was pressed.
        page.get_by_label("YAML", exact=True).fill(text.replace("micro_batch", "micro_bath"))
        expect(page.locator("#wrong-yaml")).to_contain_text("Line 4.")
        expect(page.locator("#wrong-yaml")).to_contain_text("did you mean 'micro_batch'?")
        expect(page.locator("#yaml")).to_have_attribute("aria-invalid", "true")
        page.screenshot(path=pictures / "submit-wrong.png", full_page=True)
        page.get_by_label("YAML", exact=True).fill(text)
        expect(page.locator("#verdict")).to_contain_text("No problem was found")
        expect(page.locator("#wrong-yaml")).to_be_hidden()
        # What it amounts to follows by itself, a little later.
        expect(page.locator("#verdict")).to_contain_text("24 (24 steps)")
        expect(page.locator("#verdict")).to_contain_text("Memory of a worker")
        page.get_by_label("Name", exact=True).fill("from-the-browser")
        page.screenshot(path=pictures / "submit-right.png", full_page=True)
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("from-the-browser")
        assert re.fullmatch(rf"{console.url}/jobs/[0-9a-f]{{32}}", page.url)
        page.evaluate("window.neverReloaded = true")
        badge = page.locator("#state .head .state")
        expect(badge).to_have_text("running", timeout=400_000)
        expect(page.locator("#log-note")).to_contain_text("Live")
        expect(page.locator("#curves svg").first).to_be_visible()
        expect(page.locator("#log")).not_to_have_text("")
        page.screenshot(path=pictures / "running.png", full_page=True)
        pause = page.get_by_role("button", name="Pause")
        # The job may end at any moment, and the button with it.
        with contextlib.suppress(LateError):
            pause.click(timeout=5_000)
            expect(page.locator("#log-pause")).to_have_text("Go on")
        expect(badge).to_have_text("finished", timeout=400_000)
        expect(page.locator("#announce")).to_have_text("from-the-browser is finished")
        expect(page.locator("#log-note")).to_contain_text("finished")
        expect(page.locator("#log")).to_contain_text("registered as models:/console-demo/1")
        expect(page.locator("#state")).to_contain_text("24 of 24")
        # The pictures that its own worker has drawn, and nothing that could not be.
        picture = page.locator("#pictures img")
        expect(picture).to_be_visible()
        assert picture.evaluate("(one) => one.decode().then(() => one.naturalWidth)") > 32
        assert page.evaluate("window.neverReloaded") is True
        page.screenshot(path=pictures / "finished.png", full_page=True)
        model = page.get_by_role("link", name="console-demo, version 1")
        expect(model).to_be_visible()
        model.click()
        expect(page.get_by_role("heading", level=1)).to_have_text("console-demo, version 1")
        expect(page.locator("#its-job")).to_have_text("from-the-browser")
        assert watched.wrong == []


def test_a_job_is_submitted_stopped_and_gone_on_with_by_the_keyboard_alone(console: Console, chromium: Browser) -> None:
    with chromium.new_context(viewport={"width": 1200, "height": 900}) as context:
        watched = Watched(context, console.url)
        page = watched.open("/")
        keys = page.keyboard
        walker = Walker(page)
        focused, walk_to = walker.focused, walker.walk_to
        keys.press("Tab")
        assert focused() == "Skip to the content"
        keys.press("Enter")
        keys.press("Tab")
        # Past the menu.
        assert focused() == "Submit a job"
        keys.press("Enter")
        page.wait_for_url("**/submit")
        walk_to("kind")
        walk_to("name")
        keys.type("by-keyboard")
        walk_to("base")
        keys.type("none")
        walk_to("yaml")
        # In the place of what the form begins with.
        keys.press("Control+A")
        keys.insert_text(CONFIG.format(root=console.root).replace("24 steps", "100000 steps"))
        expect(page.locator("#verdict")).to_contain_text("No problem was found")
        walk_to("send")
        keys.press("Enter")
        page.wait_for_url("**/jobs/*")
        walk_to("cancel-open")
        keys.press("Enter")
        # What was opened stays open, and the focus stays, while the page goes on to live.
        state = page.locator("#state .head .state")
        expect(state).to_have_text("running")
        expect(page.locator("#state")).to_contain_text("Waits for data", timeout=400_000)
        assert focused() == "cancel-open"
        check_meters(console, "by-keyboard")
        keys.press("Tab")
        assert focused() == "cancel-sure"
        keys.press("Enter")
        expect(state).to_have_text("killed")
        walker.confirm("resume", "running")
        expect(page.locator("#log")).to_contain_text(re.compile(r"going on from step [1-9]"), timeout=400_000)
        walker.confirm("cancel", "killed")
        (job,) = jobs(console, "by-keyboard")
        assert (job["state"], len(job["attempts"])) == ("killed", 2)
        # Once more from the beginning, as a program asks for it: what there was is set aside.
        run = console.root / "jobs" / job["id"] / "run"
        ask(console, "POST", f"/v1/jobs/{job['id']}/retry")
        processes.await_(lambda: run.with_name("run.1").exists(), "the earlier run is set aside", 60)
        ask(console, "POST", f"/v1/jobs/{job['id']}/cancel")
        processes.await_(lambda: jobs(console, "by-keyboard")[0]["state"] == "killed", "it is cancelled", 60)
        assert watched.wrong == []


def test_a_model_and_its_job_are_reached_by_the_keyboard_alone(console: Console, chromium: Browser) -> None:
    with chromium.new_context(viewport={"width": 1200, "height": 900}) as context:
        watched = Watched(context, console.url)
        walker = Walker(watched.open("/"))
        walker.follow("Models", "**/models")
        walker.follow("lorot-earlier", "**/models/lorot-earlier")
        walker.follow("version 1", "**/models/lorot-earlier/1")
        walker.follow("its-job", f"**/jobs/{console.finished}")
        assert watched.wrong == []


def check_meters(console: Console, name: str) -> None:
    """What Prometheus reads of a training that runs."""

    def meter(what: str) -> float | None:
        with urllib.request.urlopen(f"{console.url}/metrics", timeout=60) as answer:
            found = re.search(rf'^{what}{{[^}}]*job_name="{name}"}} (\S+)$', answer.read().decode(), re.MULTILINE)
        return float(found[1]) if found else None

    # What a job says of itself is remembered for ten seconds, nothing included.
    processes.await_(lambda: (meter("lorot_job_images_per_second") or 0) > 0, "its images a second are told", 60)
    share = meter("lorot_job_data_wait_share")
    assert share is not None
    assert 0 <= share <= 1


def ask(console: Console, method: str, path: str) -> Any:
    """What the API answers."""
    request = urllib.request.Request(console.url + path, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def jobs(console: Console, name: str) -> list[dict[str, Any]]:
    """What the API says of the jobs of this name."""
    found: list[dict[str, Any]] = ask(console, "GET", f"/v1/jobs?name={name}")["jobs"]
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_dark(
    console: Console, chromium: Browser, pictures: Path, scheme: str
) -> None:
    with chromium.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme) as context:  # type: ignore[arg-type]
        watched = Watched(context, console.url)
        for path in paths(console):
            page = watched.open(path)
            for details in page.locator("details").all():
                details.evaluate("(one) => { one.open = true; }")
            found = browsing.look(page, "contrast")
            assert found["wrong"] == [], path
            assert found["seen"] > 5
            assert browsing.look(page, "nameless") == [], path
            name = path.strip("/").replace("/", "-")[:12] or "jobs"
            page.screenshot(path=pictures / f"{scheme}-{name}.png", full_page=True)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(246, 247, 249)"
        assert dark == (scheme == "dark")
        # The last one is of a job that is not there.
        assert [text for text in watched.wrong if "404" not in text] == []


def test_no_page_is_wider_than_a_phone(console: Console, chromium: Browser, pictures: Path) -> None:
    with chromium.new_context(viewport={"width": 360, "height": 740}, has_touch=True) as context:
        watched = Watched(context, console.url)
        for path in paths(console):
            page = watched.open(path)
            for details in page.locator("details").all():
                details.evaluate("(one) => { one.open = true; }")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 360, f"{path}: {wide}"
            small = browsing.look(page, "small")
            assert small == [], path
            name = path.strip("/").replace("/", "-")[:12] or "jobs"
            page.screenshot(path=pictures / f"phone-{name}.png", full_page=True)


def test_whatever_has_the_focus_shows_it(console: Console, chromium: Browser) -> None:
    with chromium.new_context(viewport={"width": 1200, "height": 900}) as context:
        watched = Watched(context, console.url)
        for path in ("/", f"/jobs/{console.failed}", "/submit", f"/compare?id={console.failed}&id={console.finished}"):
            page = watched.open(path)
            seen = 0
            for _ in range(60):
                page.keyboard.press("Tab")
                found = browsing.look(page, "focus")
                if found["tag"] == "BODY":
                    break
                assert found["style"] == "solid", (path, found)
                assert found["width"] >= 2, (path, found)
                seen += 1
            assert seen > 8, path


def test_what_a_job_writes_does_nothing_in_the_browser(console: Console, chromium: Browser) -> None:
    with chromium.new_context() as context:
        watched = Watched(context, console.url)
        page = watched.open(f"/jobs/{console.failed}")
        expect(page.locator("#log")).to_contain_text("<img src=x onerror=alert(1)>")
        assert "\x1b" not in page.locator("#log").inner_text()
        assert page.title() == f"{'a' * 63}, failed · lorot"
        assert page.locator("img[src=x]").count() == 0
        assert watched.wrong == []


def test_without_javascript_jobs_are_checked_submitted_and_cancelled_all_the_same(
    console: Console, chromium: Browser
) -> None:
    with chromium.new_context(java_script_enabled=False) as context:
        watched = Watched(context, console.url)
        page = watched.open("/submit")
        page.get_by_label("Name", exact=True).fill("without-script")
        page.get_by_label("Overrides").fill("data.root=/etc")
        page.get_by_role("button", name="Check").click()
        expect(page.locator("#wrong-overrides")).to_contain_text("Line 1.")
        page.get_by_label("Overrides").fill(f"data.root={console.root}/data/demo\nduration=100000 steps")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("without-script")
        page.get_by_text("Cancel …").click()
        # The answer leads back to this page: to load it anew before that has come would stop it half way.
        with page.expect_navigation():
            page.get_by_role("button", name="Yes, cancel it").click()
        here = page.url

        def state() -> str:
            page.goto(here)
            return page.locator("#state .head .state").inner_text()

        processes.await_(lambda: state() == "killed", "the job is cancelled", 60, state)
        assert watched.wrong == []
