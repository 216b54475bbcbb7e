"""The page of jobs side by side in a real browser, with a keyboard alone and without a script."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.integration.browser import Walker, Watched
from tests.integration.live_console import Console

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("has_script", [True, False], ids=["by-keyboard", "without-javascript"])
def test_jobs_are_ticked_in_the_list_and_compared(
    console: Console, chromium: Browser, pictures: Path, has_script: bool
) -> None:
    with chromium.new_context(viewport={"width": 1200, "height": 900}, java_script_enabled=has_script) as context:
        watched = Watched(context, console.url)
        page = watched.open("/")
        walker = Walker(page)
        boxes = [page.locator(f"#pick-{job_id}") for job_id in (console.finished, console.failed)]
        for job_id, box in zip((console.finished, console.failed), boxes, strict=True):
            walker.walk_to(f"pick-{job_id}")
            page.keyboard.press("Space")
            expect(box).to_be_checked()
        if has_script:
            # Another state of the list is put in place meanwhile.
            page.evaluate("""() => {
              const other = new DOMParser().parseFromString(document.documentElement.outerHTML, "text/html");
              other.getElementById("jobs").dataset.say = "something else";
              lorot.take(other);
            }""")
            expect(page.locator("#announce")).to_have_text("something else")
            for box in boxes:
                expect(box).to_be_checked()
        walker.walk_to("compare", "Shift+Tab")
        page.keyboard.press("Enter")
        page.wait_for_url(f"{console.url}/compare?*")
        expect(page.get_by_role("heading", level=1)).to_have_text("Compare jobs")
        expect(page.locator("#metrics tbody th")).to_have_text(["train/loss", "val/top1"])
        expect(page.locator("#settings tbody th")).to_have_text(["name"])
        charts = page.locator("#curves svg")
        assert [chart.locator("polyline").count() for chart in charts.all()] == [2, 2]
        page.screenshot(path=pictures / f"compare-{has_script}.png", full_page=True)
        # The first one's.
        walker.follow("Leave away", f"{console.url}/compare?id={console.failed}&")
        expect(page.locator("#metrics")).to_have_count(0)
        walker.walk_to("more")
        page.keyboard.type(console.finished[:12])
        page.keyboard.press("Enter")
        expect(page.locator("#another input[type=hidden]")).to_have_count(2)
        assert watched.wrong == []
