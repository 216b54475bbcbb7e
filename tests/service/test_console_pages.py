"""The console's pages of jobs and models, as a browser without JavaScript gets them."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service import store
from service.api import guard
from service.console import job_pages
from tests.service.console_service import TINY, Service, service
from tests.service.html_page import Element, Page

HOSTILE = "<script>alert('x')</script>&\"' \x1b[31mred\x1b[0m \u202etxt.exe"
VISIBLE = "<script>alert('x')</script>&\"'"


@pytest.fixture
def here(place: str, tmp_path: Path) -> Service:
    return service(tmp_path)


def get(here: Service, path: str, status: int = 200) -> Page:
    answer = here.client.get(path)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return Page(answer.text)


def running(here: Service, **fields: Any) -> str:
    """A job in the middle of its training."""
    job = here.run(here.submit(**fields), started_s=time.time() - 7200)
    records = [
        {
            "step": step,
            "time_s": 1000.0 + step,
            "train/loss": 3.0 - step / 100,
            "train/lr": 0.1,
            "train/images_per_s": 512.0,
        }
        for step in (50, 100, 150)
    ]
    run = here.measured(job, [*records, {"step": 150, "time_s": 1151.0, "val/top1": 0.625}], total_steps=400)
    Image.new("RGB", (20, 10)).save(run / "samples.png")
    here.wrote(job, b"step 150 loss 1.5\n")
    return job.id


def register(here: Service, run_id: str, **tags: str) -> None:
    """A model of two versions, as registration writes them."""
    api = store.client(here.desk.record.uri)
    api.create_registered_model("lorot-demo")
    given = {"data": "demo", "objective": "multi_task", "pretext": "lorot_e", "metric.val/top1": "0.8125", **tags}
    for _ in range(2):
        api.create_model_version("lorot-demo", f"runs:/{run_id}/model", run_id, tags=given)
    api.set_registered_model_alias("lorot-demo", "best", "1")


def test_an_empty_list_says_how_to_begin(here: Service) -> None:
    page = get(here, "/")
    assert "No jobs yet" in page.shown
    assert "lorot submit configs/quickstart.yaml" in page.shown
    assert page.all("a", href="/submit")


def test_the_list_shows_how_far_each_job_is(here: Service) -> None:
    running(here)
    here.submit(name="next")
    page = get(here, "/")
    assert "2 jobs" in page.shown
    assert "step 150 of 400" in page.shown
    assert "512" in page.shown
    # 250 steps are left, at 100 steps in 101 seconds.
    assert "4 min 12 s" in page.shown
    assert [bar["value"] for bar in page.all("progress") if bar["aria-label"] == "Progress of demo"] == ["37.5"]
    names = [link.text for link in page.all("a", class_="name")]
    assert names == ["next", "demo"]
    assert "1 of 8" in page.shown  # the cores


def test_the_list_is_filtered_and_paged(here: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    spec_owner = [("alpha", "ann"), ("beta", "bob"), ("beta-2", "ann")]
    for name, owner in spec_owner:
        here.submit(name=name, owner=owner)
    shown = {
        query: [link.text for link in get(here, f"/?{query}").all("a", class_="name")]
        for query in ("name=BETA", "owner=ann", "owner=ann&name=beta", "state=failed", "kind=train")
    }
    assert shown == {
        "name=BETA": ["beta-2", "beta"],
        "owner=ann": ["beta-2", "alpha"],
        "owner=ann&name=beta": ["beta-2"],
        "state=failed": [],
        "kind=train": ["beta-2", "beta", "alpha"],
    }
    assert "No job is like that" in get(here, "/?state=failed").shown
    monkeypatch.setattr(job_pages, "_PAGE", 3)
    for number in range(3):
        here.submit(name=f"more-{number}", owner="ann")
    first = get(here, "/?owner=ann")
    older = first.by_id("older")
    assert older is not None
    second = get(here, older["href"])
    everything = [link.text for page in (first, second) for link in page.all("a", class_="name")]
    assert everything == [*(f"more-{number}" for number in reversed(range(3))), "beta-2", "alpha"]
    assert second.by_id("older") is None


def test_a_job_shows_curves_numbers_cost_log_and_pictures(here: Service) -> None:
    job_id = running(here)
    page = get(here, f"/jobs/{job_id}")
    for said in (
        "It runs",
        "38 %",
        "Loss",
        "Learning rate",
        "62.5%",
        "Core-hours",
        "2.00",
        "Wall time",
        "2 h 0 min",
        "pid 812",
    ):
        assert said in page.shown, said
    log = page.by_id("log")
    assert log is not None
    assert log.text == "step 150 loss 1.5\n"
    assert {svg["aria-label"].partition(":")[0] for svg in page.all("svg", role="img")} == {
        "Loss",
        "Top-1 accuracy",
        "Learning rate",
        "Speed",
    }
    pictures = [image["src"] for image in page.all("img")]
    assert len(pictures) == 1
    assert here.client.get(pictures[0]).headers["content-type"] == "image/png"
    assert page.all("body")[0]["data-refresh"] == "2"


def test_on_how_many_images_a_job_has_trained_is_told_where_its_batch_is_a_default(here: Service) -> None:
    config = {key: value for key, value in TINY.items() if key not in ("global_batch", "micro_batch")}
    job_id = running(here, config=config)
    batch = here.desk.configuration(job_id)["global_batch"]
    assert f"{batch * 150:,}" in get(here, f"/jobs/{job_id}").shown


def test_a_job_that_waits_says_which_turn_it_has_and_one_that_ended_why(here: Service) -> None:
    first, second = here.submit(), here.submit()
    waiting = get(here, f"/jobs/{second.id}").shown
    assert "waits for its turn: number 2 of 2" in waiting
    assert "Resolved, as it will start" in waiting
    assert "momentum: 0.9" in waiting
    here.run(first)
    here.desk.record.change(first.id, state="failed", reason="non-finite loss at step 12", ended_s=time.time())
    page = get(here, f"/jobs/{first.id}")
    assert "has failed" in page.shown
    assert "non-finite loss at step 12" in page.shown


def test_the_page_of_a_job_that_may_go_on_is_asked_for_rarely_and_made_again_only_once_it_does(
    here: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = here.run(here.submit())
    assert get(here, f"/jobs/{job.id}").all("body")[0]["data-version"] == ""
    here.desk.record.change(job.id, state="failed", ended_s=time.time())
    body = get(here, f"/jobs/{job.id}").all("body")[0]
    assert int(body["data-refresh"]) >= 10
    known = {"if-none-match": f'"{body["data-version"]}"'}
    with monkeypatch.context() as patch:
        # No file is read for it, and MLflow is not asked.
        patch.setattr(here.desk, "metrics", None)
        patch.setattr(here.desk, "configuration", None)
        patch.setattr(here.desk, "progress", None)
        answer = here.client.get(f"/jobs/{job.id}", headers=known)
    assert (answer.status_code, answer.content) == (304, b"")
    # Also where it has ended once more meanwhile.
    here.desk.resume(job.id)
    resumed = here.client.get(f"/jobs/{job.id}", headers=known)
    assert Page(resumed.text).all("body")[0]["data-refresh"] == "2"
    here.desk.cancel(job.id)
    assert here.client.get(f"/jobs/{job.id}", headers=known).status_code == 200


def test_the_page_of_a_job_that_is_done_is_not_asked_for_again(here: Service) -> None:
    job = here.run(here.submit())
    here.desk.record.change(job.id, state="finished", ended_s=time.time())
    assert "data-refresh" not in get(here, f"/jobs/{job.id}").all("body")[0].attributes


def test_a_part_of_an_id_leads_to_the_job_and_an_unknown_one_says_so(here: Service) -> None:
    job = here.submit()
    answer = here.client.get(f"/jobs/{job.id[:8]}")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job.id}")
    assert "there is no job" in get(here, "/jobs/00000000000000000000000000000000", 404).shown
    assert "no registered model" in get(here, "/models/nobody", 404).shown
    get(here, f"/jobs/{job.id}?node=x", 400)


def test_text_from_outside_is_shown_and_does_nothing(here: Service) -> None:
    job = here.submit(environment={"GREETING": HOSTILE})
    here.run(job, handle={"pid": HOSTILE})
    here.wrote(job, HOSTILE.encode())
    here.desk.record.change(job.id, state="failed", reason=HOSTILE, ended_s=time.time())
    register(
        here,
        job.id,
        data=HOSTILE,
        run_name=HOSTILE,
        **{"downstream.wsol.gt_known:0.5": "0.5", "downstream.wsol.data_digest": HOSTILE},
    )
    for path in (
        "/",
        f"/jobs/{job.id}",
        "/models",
        "/models/lorot-demo",
        "/models/lorot-demo/1",
        f"/submit?like={job.id}",
        f"/?name={VISIBLE}&owner={VISIBLE}",
    ):
        page = get(here, path)
        check_that_nothing_is_inline(page)
        assert {script["src"].partition("?")[0] for script in page.all("script")} <= {
            "/static/console.js",
            "/static/log.js",
            "/static/submit.js",
        }
    page = get(here, f"/jobs/{job.id}")
    log = page.by_id("log")
    assert log is not None
    assert log.text == f"{VISIBLE} red �txt.exe"
    assert page.shown.count(VISIBLE) == 3  # the log, the reason, the handle
    assert not {"\x1b", "\u202e"} & set(page.source)


def test_nothing_on_any_page_is_inline_or_from_elsewhere(here: Service) -> None:
    job_id = running(here)
    register(here, job_id)
    for path in ("/", f"/jobs/{job_id}", "/models", "/models/lorot-demo", "/models/lorot-demo/2", "/submit", "/login"):
        answer = here.client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        page = Page(answer.text)
        check_that_nothing_is_inline(page)
        for element in page.elements:
            for name in ("src", "href", "action"):
                address = element.attributes.get(name, "/")
                assert address.startswith(("/", "#")), address
                assert not address.startswith("//")
                if element.tag in ("link", "script", "img"):
                    assert here.client.get(address).status_code == 200, address


def check_that_nothing_is_inline(page: Page) -> None:
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"], element
        assert element.tag not in ("style", "iframe", "object", "embed", "base")
        if element.tag == "script":
            assert element.text == ""


def test_everything_has_a_name_for_those_who_cannot_see_it(here: Service) -> None:
    job_id = running(here, backend="docker", nodes="2")
    register(here, job_id)
    for path in ("/", f"/jobs/{job_id}", "/models", "/models/lorot-demo", "/models/lorot-demo/2", "/submit", "/login"):
        page = get(here, path)
        labels = {label["for"] for label in page.all("label")}
        for field in page.elements:
            if field.tag in ("input", "select", "textarea") and field.attributes.get("type") != "hidden":
                assert field["id"] in labels, f"{path}: {field}"
        for element in page.elements:
            for id_ in (
                *element.attributes.get("aria-describedby", "").split(),
                *element.attributes.get("aria-labelledby", "").split(),
            ):
                assert page.by_id(id_), f"{path}: {element} names {id_}, which is not there"
        ids = [element["id"] for element in page.elements if "id" in element.attributes]
        assert len(ids) == len(set(ids)), path
        levels = [int(element.tag[1]) for element in page.elements if element.tag in ("h1", "h2", "h3", "h4")]
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), (path, levels)
        assert page.all("a", class_="skip")[0]["href"] == "#main"
        assert page.all("html")[0]["lang"] == "en"
        for control in (*page.all("button"), *page.all("a"), *page.all("summary")):
            assert control.text.strip() or control.attributes.get("aria-label"), f"{path}: {control}"


def test_buttons_are_forms_that_need_no_script(here: Service) -> None:
    job = here.run(here.submit())
    page = get(here, f"/jobs/{job.id}")
    forms = [form for form in page.all("form") if form.attributes.get("method") == "post"]
    assert [form["action"] for form in forms] == [f"/jobs/{job.id}/cancel"]
    answer = here.client.post(forms[0]["action"], data=token_in(page, forms[0]))
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job.id}")
    assert here.desk.get(job.id).cancel
    assert "Somebody has asked to stop it" in get(here, f"/jobs/{job.id}").shown
    here.desk.record.change(job.id, state="killed", ended_s=time.time())
    assert actions(get(here, f"/jobs/{job.id}")) == ["resume", "retry"]
    assert here.client.post(f"/jobs/{job.id}/resume").status_code == 303
    assert here.desk.get(job.id).state == "queued"
    assert here.desk.get(job.id).resume
    answer = here.client.post(f"/jobs/{job.id}/retry")
    assert answer.status_code == 409
    assert "cancel it first" in Page(answer.text).shown
    here.desk.cancel(job.id)
    assert here.client.post(f"/jobs/{job.id}/retry").status_code == 303
    assert (here.desk.get(job.id).state, here.desk.get(job.id).resume) == ("queued", False)
    assert here.client.post(f"/jobs/{job.id}/destroy").status_code == 404


def test_a_finished_job_is_not_offered_again(here: Service) -> None:
    job = here.run(here.submit())
    here.desk.record.change(job.id, state="finished", ended_s=time.time())
    assert actions(get(here, f"/jobs/{job.id}")) == []


def token_in(page: Page, form: Element) -> dict[str, str]:
    return {field["name"]: field["value"] for field in page.all("input", type="hidden") if form in field.inside}


def actions(page: Page) -> list[str]:
    return [
        form["action"].rpartition("/")[2]
        for form in page.all("form")
        if form["action"].startswith("/jobs/") and form.attributes.get("method") == "post"
    ]


def test_another_sites_page_can_press_no_button(here: Service) -> None:
    job = here.submit()
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        answer = here.client.post(f"/jobs/{job.id}/cancel", headers=headers)
        assert answer.status_code == 403
        assert "another site" in Page(answer.text).shown
    assert here.desk.get(job.id).state == "queued"


def test_with_a_session_a_form_without_its_proof_is_refused(here: Service) -> None:
    job = here.submit(owner="ann")
    ann = here.log_in("ann", "submit")
    page = Page(ann.get(f"/jobs/{job.id}").text)
    proof = token_in(page, page.all("form", action=f"/jobs/{job.id}/cancel")[0])["csrf"]
    for sent in ({}, {"csrf": ""}, {"csrf": "0" * 64}, {"csrf": proof[:-1]}):
        for path in (f"/jobs/{job.id}/cancel", "/submit", "/logout"):
            assert ann.post(path, data=sent).status_code == 403, (path, sent)
    assert here.desk.get(job.id).state == "queued"
    assert ann.get("/").status_code == 200
    bob = here.log_in("bob", "admin")
    assert bob.post(f"/jobs/{job.id}/cancel", data={"csrf": proof}).status_code == 403
    assert ann.post(f"/jobs/{job.id}/cancel", data={"csrf": proof}).status_code == 303
    assert here.desk.get(job.id).state == "killed"


def test_what_one_may_not_do_is_not_offered_and_not_done(here: Service) -> None:
    job = here.submit(owner="ann")
    reader, other, admin = here.log_in("eve", "read"), here.log_in("bob", "submit"), here.log_in("root", "admin")
    seen = {
        name: Page(browser.get(f"/jobs/{job.id}").text)
        for name, browser in (("reader", reader), ("other", other), ("admin", admin))
    }
    assert {name: actions(page) for name, page in seen.items()} == {"reader": [], "other": [], "admin": ["cancel"]}
    assert not seen["reader"].all("a", href="/submit")
    assert seen["other"].all("a", href="/submit")
    assert reader.get("/submit").status_code == 403
    for browser in (reader, other):
        page = Page(browser.get("/").text)
        proof = page.all("input", name="csrf")[0]["value"]
        assert browser.post(f"/jobs/{job.id}/cancel", data={"csrf": proof}).status_code == 403
    proof = Page(reader.get("/").text).all("input", name="csrf")[0]["value"]
    assert reader.post("/submit", data={"csrf": proof, "kind": "train"}).status_code == 403
    assert here.desk.get(job.id).state == "queued"
    assert len(here.desk.record.jobs()) == 1


def test_who_is_not_known_is_led_to_the_login_and_back(here: Service) -> None:
    job = here.submit()
    token = here.access.tokens.create("ann", "read")
    answer = here.client.get(f"/jobs/{job.id}?node=0")
    assert answer.status_code == 303
    page = Page(here.client.get(answer.headers["location"]).text)
    assert "lorot token create" in page.shown
    assert not page.all("nav")
    sent = {field["name"]: field.attributes.get("value", "") for field in page.all("input")}
    wrong = here.client.post("/login", data={**sent, "token": "lorot_wrong"})
    assert wrong.status_code == 401
    assert "not known here" in Page(wrong.text).shown
    assert "lorot_wrong" not in wrong.text
    right = here.client.post("/login", data={**sent, "token": token})
    assert (right.status_code, right.headers["location"]) == (303, f"/jobs/{job.id}?node=0")
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert token.lower() not in cookie
    page = Page(here.client.get("/").text)
    assert "ann" in page.all("header")[0].text
    proof = page.all("input", name="csrf")[0]["value"]
    assert here.client.post("/logout", data={"csrf": proof}).status_code == 303
    assert here.client.get("/").status_code == 303
    assert here.client.post(f"/jobs/{job.id}/cancel", data={"csrf": proof}).status_code == 401


def test_a_long_form_is_refused_with_a_page_when_its_session_has_ended(place: str, tmp_path: Path) -> None:
    there = service(tmp_path)
    browser = there.log_in("ann", "submit")
    sent = Page(browser.get("/submit").text).fields() | {"action": "submit", "yaml": "#" * 2 * guard.STRANGERS_BYTES}
    assert browser.post("/submit/look", data=sent).status_code == 200
    there.access.tokens.revoke("ann")
    for path in ("/submit", "/submit/look"):
        answer = browser.post(path, data=sent)
        assert (answer.status_code, answer.headers["content-type"]) == (401, "text/html; charset=utf-8")
        assert "Who are you?" in Page(answer.text).shown
    assert there.desk.record.jobs() == []


@pytest.mark.parametrize(
    "target",
    [
        "http://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\nb",
        "https:evil.example",
        "/\tx",
        "",
    ],
)
def test_the_login_leads_nobody_to_another_site(here: Service, target: str) -> None:
    token = here.access.tokens.create("ann", "read")
    answer = here.client.post("/login", data={"token": token, "next": target})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    page = Page(here.client.get("/login", params={"next": target}).text)
    assert page.all("input", name="next")[0]["value"] == "/"


def test_a_model_shows_how_good_it_is_and_where_it_comes_from(here: Service) -> None:
    job_id = running(here)
    api = store.client(here.desk.record.uri)
    api.log_param(job_id, "model.init_from", "models:/lorot-imagenet/7")
    api.set_tag(job_id, "git.commit", "c0ffee")
    found = {
        "downstream.wsol.gt_known:0.5": "0.75",
        "downstream.wsol.run_id": "feed",
        "downstream.wsol.data_digest": "d1",
    }
    register(here, job_id, data_digest="abc123", run_name="quickstart", **found)
    assert "81.2%" in get(here, "/models").shown
    page = get(here, "/models/lorot-demo")
    assert "2 versions" in page.shown
    assert [tag.text for tag in page.all("span", class_="tag")] == ["latest", "best"]
    page = get(here, "/models/lorot-demo/1")
    for said in (
        "81.2%",
        "abc123",
        "c0ffee",
        "models:/lorot-imagenet/7",
        "wsol",
        "75.0%",
        "feed",
        "d1",
        "lorot wsol --model models:/lorot-demo@best",
    ):
        assert said in page.shown, said
    link = page.by_id("its-job")
    assert link is not None
    assert link["href"] == f"/jobs/{job_id}"
    assert page.all("a", href="/models/lorot-imagenet/7")
    registered = [link["href"] for link in get(here, f"/jobs/{job_id}").all("a") if "/models/" in link["href"]]
    assert registered == ["/models/lorot-demo/1", "/models/lorot-demo/2"]
    assert "versions: 2, 1" in get(here, "/models/lorot-demo/9", 404).shown


def test_a_tracking_server_that_is_away_leaves_the_jobs_to_be_seen(
    here: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = running(here)
    get(here, "/")
    away = "http://127.0.0.1:9"
    monkeypatch.setattr(here.app.state.shelf, "_uri", away)
    assert "38 %" in get(here, f"/jobs/{job_id}").shown
    page = get(here, "/models", 503)
    assert "does not answer" in page.shown
    assert page.all("nav")


def test_a_run_in_an_mlflow_server_is_linked_without_its_password(here: Service) -> None:
    job_id = running(here)
    assert not [link for link in get(here, f"/jobs/{job_id}").all("a") if "MLflow" in link.text]
    here.desk.record.uri = "http://someone:secret@tracker:5000"
    text = here.client.get(f"/jobs/{job_id}").text
    assert f'href="http://tracker:5000/#/experiments/1/runs/{job_id}"' in text
    assert "secret" not in text


def test_a_run_is_linked_by_the_address_that_browsers_reach_mlflow_at(
    here: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = running(here)
    here.desk.record.uri = "http://tracker:5000"
    reached = {"browser_tracking_uri": "https://someone:secret@mlflow.lan/"}
    monkeypatch.setattr(here.desk, "settings", here.desk.settings.model_copy(update=reached))
    text = here.client.get(f"/jobs/{job_id}").text
    assert f'href="https://mlflow.lan/#/experiments/1/runs/{job_id}"' in text
    assert "secret" not in text
