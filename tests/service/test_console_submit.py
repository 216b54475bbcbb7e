"""The submit form: what it finds, where it says so, and that one form is one job."""

import json
import runpy
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from pipelines.amounts import shown_bytes
from service import check, config, config_file
from service.api import guard
from service.api.limits import Buckets
from service.console import amounts, submission
from tests.service.console_service import TINY, Service, service
from tests.service.html_page import Page

LINES = yaml.safe_dump(TINY, sort_keys=False)


@pytest.fixture
def here(place: str, tmp_path: Path) -> Service:
    return service(tmp_path)


def filled(here: Service, **fields: str) -> dict[str, str]:
    """The form as the page gives it, with these fields changed."""
    answer = here.client.get("/submit")
    assert answer.status_code == 200, answer.text
    return {**Page(answer.text).fields(), **fields}


def send(here: Service, action: str, status: int, **fields: str) -> Page:
    """Send the form, as it is typed or by a button."""
    path = "/submit/look" if action == "validate" else "/submit"
    answer = here.client.post(path, data={**filled(here, **fields), "action": action})
    assert answer.status_code == status, answer.text
    return Page(answer.text)


def told(page: Page) -> dict[str, str]:
    """Field -> what is said beside it."""
    found = {
        element["id"].removeprefix("wrong-"): element.text.strip()
        for element in page.elements
        if element.attributes.get("id", "").startswith("wrong-")
    }
    return {name: text for name, text in found.items() if text}


def test_the_form_as_it_is_first_shown_is_right(here: Service) -> None:
    page = send(here, "validate", 200)
    assert told(page) == {}
    assert "No problem was found" in page.shown
    assert here.desk.record.jobs() == []


def test_each_place_shows_the_fields_that_it_takes(here: Service) -> None:
    form = Page(here.client.get("/submit").text)
    options = [one.attributes for one in form.elements if one.tag == "option" and one.inside[-1]["name"] == "backend"]
    assert options == [
        {"value": "local", "selected": ""},
        {"value": "docker", "data-containers": "", "data-mounts": ""},
    ]
    style = here.client.get("/static/console.css").text
    for mark in ("containers", "mounts"):
        assert f".submission:not(:has(#backend option[data-{mark}]:checked)) .only-{mark}" in style
        assert any(f"only-{mark}" in one.attributes.get("class", "").split() for one in form.elements)


def test_the_form_is_right_at_first_where_data_lies_elsewhere_and_says_what_has_to_be_there(
    place: str, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    there = service(
        tmp_path, data_roots=[elsewhere], backends={"local": {"enabled": False}, "docker": {"enabled": True}}
    )
    first = Page(there.client.get("/submit").text)
    assert (first.fields()["backend"], first.fields()["overrides"]) == ("docker", "")
    assert yaml.safe_load(first.fields()["yaml"]) == {"data": {"root": f"{elsewhere}/demo"}}
    assert f"lorot data demo --root {elsewhere}/demo" in first.shown
    page = send(there, "validate", 200)
    assert told(page) == {}
    assert "No problem was found" in page.shown
    (elsewhere / "demo").mkdir(parents=True)
    assert "lorot data demo" not in Page(there.client.get("/submit").text).shown


def test_the_form_begins_empty_where_jobs_may_read_no_folder(place: str, tmp_path: Path) -> None:
    first = Page(service(tmp_path, data_roots=[]).client.get("/submit").text)
    assert (first.fields()["base"], first.fields()["yaml"]) == ("", "")
    assert "data_roots" in first.shown


@pytest.mark.parametrize(
    ("fields", "field", "line", "says"),
    [
        (
            {"base": "", "yaml": LINES + "optimizer:\n  lrr: 0.1\n"},
            "yaml",
            LINES.count("\n") + 2,
            "did you mean 'optimizer.lr'?",
        ),
        (
            {"base": "", "yaml": LINES + "optimizer:\n  name: sgd\n  lr: fast\n"},
            "yaml",
            LINES.count("\n") + 3,
            "number",
        ),
        ({"base": "", "yaml": "duration: [1"}, "yaml", 1, "not valid YAML"),
        ({"base": "", "yaml": ""}, "yaml", 0, "choose a configuration"),
        ({"overrides": "seed=1\n# a comment\n\noptimizer.lr=-1"}, "overrides", 4, "greater than 0"),
        ({"overrides": "seed"}, "overrides", 1, "write key.sub=value"),
        ({"overrides": "seed=&a [*a]"}, "overrides", 1, "aliases"),
        ({"overrides": "data.root=/etc"}, "overrides", 1, "outside"),
        ({"overrides": "seed.x=1"}, "overrides", 1, "holds a value"),
        ({"base": "../../secret.yaml"}, "base", 0, "there is no configuration"),
        ({"nodes": "4:1"}, "nodes", 0, "fewest"),
        ({"nodes": "2"}, "nodes", 0, "one machine"),
        ({"cpus": "many"}, "cpus", 0, "number"),
        ({"cpus": "64"}, "cpus", 0, "never fit"),
        ({"gpus": "1"}, "gpus", 0, "never fit"),
        ({"memory": "lots"}, "memory", 0, "8GB"),
        ({"priority": "1000"}, "priority", 0, "100"),
        ({"retries": "21"}, "retries", 0, "more than this service allows"),
        ({"name": "no spaces"}, "name", 0, "63 letters"),
        ({"environment": "A=1\nB"}, "environment", 2, "NAME=VALUE"),
        ({"environment": "LOROT_RUN_ID=1"}, "environment", 0, "set by the service"),
        ({"kind": "detect", "base": "downstream/demo-retinanet.yaml"}, "model", 0, "models:/NAME@best"),
        ({"kind": "container", "backend": "docker"}, "command", 0, "needs one"),
        ({"kind": "container", "backend": "docker", "command": "echo 'open"}, "command", 0, "quote"),
        ({"kind": "container", "command": "true"}, "backend", 0, "docker or kubernetes"),
        ({"backend": "docker", "image": "-v"}, "image", 0, "pattern"),
        ({"base": "downstream/demo-retinanet.yaml"}, "base", 0, "detect"),
    ],
)
def test_what_is_wrong_is_said_beside_its_field_and_line(
    here: Service, fields: dict[str, str], field: str, line: int, says: str
) -> None:
    (here.desk.settings.results.parent / "data").mkdir(exist_ok=True)
    for action, status in (("validate", 200), ("submit", 400)):
        page = send(here, action, status, **fields)
        found = told(page)
        assert says in found[field], found
        assert list(found) == [field]
        assert (f"Line {line}." in found[field]) == bool(line), found
        element = page.by_id(field)
        assert element is not None
        assert element["aria-invalid"] == "true"
        assert f"wrong-{field}" in element["aria-describedby"].split()
    assert here.desk.record.jobs() == []


def test_all_problems_are_told_at_once_and_what_was_typed_stays(here: Service) -> None:
    typed = {"cpus": "many", "nodes": "x", "overrides": "optimizer.lr=-1", "environment": "<b>"}
    page = send(here, "submit", 400, **typed)
    assert set(told(page)) == set(typed)
    assert "4 problems" in page.shown
    assert {name: page.fields()[name] for name in typed} == typed


def test_the_rules_are_those_of_the_command(here: Service) -> None:
    given = {"optimizer": {"lrr": 1}, "ema": {"decay": 2}, "pretext": {"name": "lorot_x"}}
    with pytest.raises(ValueError, match="lrr") as caught:
        config.resolve_any(dict(given))
    by_command = {line.strip() for line in str(caught.value).splitlines()[1:]}
    found = submission.check(
        submission.fields_of({"base": "", "yaml": json.dumps(given)}, here.desk.settings), here.desk
    )
    assert {problem.text for problem in found.problems} == by_command


def test_a_shipped_configuration_with_yaml_and_overrides_on_top_is_what_is_submitted(here: Service) -> None:
    answer = here.client.post(
        "/submit",
        data={
            **filled(
                here, yaml="optimizer: {lr: 0.5, momentum: 0.8}\nseed: 1", overrides="optimizer.lr=0.25", name="mine"
            ),
            "action": "submit",
        },
    )
    assert answer.status_code == 303, answer.text
    (job,) = here.desk.record.jobs()
    assert answer.headers["location"] == f"/jobs/{job.id}"
    expected = config_file.read(config_file.shipped("quickstart.yaml"))
    expected["optimizer"] |= {"lr": 0.25, "momentum": 0.8}
    expected["seed"] = 1
    assert job.spec.config == expected
    assert (job.spec.name, job.owner) == ("mine", "local")


def test_a_form_that_is_sent_twice_is_one_job(here: Service) -> None:
    sent = {**filled(here), "action": "submit"}
    first, second = (here.client.post("/submit", data=sent) for _ in range(2))
    assert first.headers["location"] == second.headers["location"]
    assert len(here.desk.record.jobs()) == 1
    other = here.client.post("/submit", data={**filled(here), "action": "submit"})
    assert other.headers["location"] != first.headers["location"]


def test_a_form_that_was_changed_after_it_was_sent_asks_before_it_makes_another_job(here: Service) -> None:
    sent = {**filled(here), "action": "submit"}
    here.client.post("/submit", data=sent)
    answer = here.client.post("/submit", data={**sent, "priority": "5"})
    assert answer.status_code == 400
    page = Page(answer.text)
    assert "handed in before" in page.shown
    assert page.fields()["key"] != sent["key"]
    again = here.client.post("/submit", data={**page.fields(), "action": "submit"})
    assert again.status_code == 303
    assert [job.spec.priority for job in here.desk.record.jobs()] == [5, 0]


def test_the_form_keeps_the_limits_the_key_and_the_count_of_the_api(place: str, tmp_path: Path) -> None:
    here = service(tmp_path, limits={"jobs": 1})
    answer = here.client.post("/submit", data={**filled(here), "action": "submit", "key": "not a key"})
    assert (answer.status_code, here.desk.record.jobs()) == (400, [])
    assert "'not a key' is none" in Page(answer.text).shown
    counted = 'lorot_submissions_total{backend="local",kind="train"} 1.0'
    assert counted not in here.app.state.meters.text().decode()
    assert here.client.post("/submit", data={**filled(here), "action": "submit"}).status_code == 303
    assert counted in here.app.state.meters.text().decode()
    full = here.client.post("/submit", data={**filled(here), "action": "submit", "name": "kept"})
    assert (full.status_code, full.headers["retry-after"]) == (429, "30")
    assert Page(full.text).fields()["name"] == "kept"
    assert len(here.desk.record.jobs()) == 1


def audited(here: Service) -> list[str]:
    path = here.desk.settings.state / "audit.jsonl"
    return [json.loads(line)["what"] for line in path.read_text().splitlines()] if path.exists() else []


def test_looking_at_a_form_is_no_submission_for_the_record_the_audit_log_or_the_limit(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No time goes by, however slow this machine is.
    monkeypatch.setattr(guard, "Buckets", lambda per_minute: Buckets(per_minute, lambda: 0.0))
    here = service(tmp_path, limits={"requests_per_minute": 4, "looks_per_minute": 9})
    sent = filled(here)
    # Whatever is pressed there, nothing is handed in.
    for action in ("validate", "submit", "") * 3:
        answer = here.client.post("/submit/look", data={**sent, "action": action})
        assert (answer.status_code, Page(answer.text).fields()["key"]) == (200, sent["key"])
    late = here.client.post("/submit/look", data={**sent, "action": "validate"})
    assert (late.status_code, late.json()["error"]["type"]) == (429, "TooManyRequestsError")
    assert 1 <= int(late.headers["retry-after"]) <= 8
    # The other requests have lost nothing by it, and who checks without a script hands nothing in either.
    assert here.client.post("/submit", data={**sent, "overrides": "=", "action": "check"}).status_code == 200
    assert (here.desk.record.jobs(), audited(here)) == ([], [])
    assert here.client.post("/submit", data={**sent, "action": "submit"}).status_code == 303
    assert audited(here) == ["form: submit"]
    assert here.client.get("/").status_code == 200
    assert here.client.get("/").status_code == 429


def test_a_look_is_for_those_who_may_submit_and_has_the_limit_of_all_bodies(place: str, tmp_path: Path) -> None:
    here = service(tmp_path, limits={"body_bytes": 2000})
    head = {name: f"Bearer {here.access.tokens.create(name, name)}" for name in ("read", "submit")}
    sent = {"action": "validate", "kind": "train"}
    long = here.client.post(
        "/submit/look", data={**sent, "yaml": "x" * 3000}, headers={"Authorization": head["submit"]}
    )
    assert long.status_code == 413
    assert here.client.post("/submit/look", data=sent).status_code == 401
    for name, status in (("read", 403), ("submit", 200)):
        assert here.client.post("/submit/look", data=sent, headers={"Authorization": head[name]}).status_code == status
    # Who was refused is noted as ever.
    assert audited(here) == ["POST /submit/look"]


def test_a_job_can_be_submitted_once_more_with_changes(here: Service) -> None:
    job = here.submit(
        priority=7, resources={"cpus": 2.5, "memory": "8GB"}, environment={"A": "x=y"}, config={**TINY, "seed": 4}
    )
    page = Page(here.client.get(f"/submit?like={job.id}").text)
    sent = page.fields()
    assert yaml.safe_load(sent["yaml"]) == job.spec.config
    assert here.client.post("/submit", data={**sent, "action": "submit"}).status_code == 303
    twin = here.desk.record.jobs()[0]
    assert twin.id != job.id
    assert twin.spec.model_dump() == job.spec.model_dump()
    container = here.submit(
        kind="container", backend="docker", config={}, command=["echo", "two words", "it's"], outputs=["a", "b c"]
    )
    page = Page(here.client.get(f"/submit?like={container.id}").text)
    assert here.client.post("/submit", data={**page.fields(), "action": "submit"}).status_code == 303
    assert here.desk.record.jobs()[0].spec == container.spec
    assert "there is no job" in Page(here.client.get("/submit?like=nobody").text).shown


def test_every_shipped_configuration_is_offered_and_says_what_it_is_for(here: Service) -> None:
    offered = submission.shipped()
    folder = config_file.shipped("quickstart.yaml").parent
    there = {
        str(path.relative_to(folder)) for part in ("train", "downstream") for path in (folder / part).glob("*.yaml")
    }
    assert set(offered) == there | {"quickstart.yaml"}
    assert offered["downstream/coco-solov2.yaml"] == "segment"
    page = send(here, "validate", 200, base="train/imagenet-lorot_e.yaml", overrides="data.root=data/imagenet")
    assert "Table 6, LoRot-E" in page.shown


def test_what_it_amounts_to_is_what_the_check_command_says(here: Service) -> None:
    page = send(here, "check", 200, base="", yaml=LINES)
    found = check.examine(config.resolve(TINY))
    assert found.plan is not None
    rows = dict(zip([row.text for row in page.all("dt")], [row.text for row in page.all("dd")], strict=True))
    assert rows["Steps"] == f"{found.plan.total_steps} (4 steps)"
    assert rows["Model"] == f"resnet_small, {found.parameters:,} parameters"
    stored = f"about {shown_bytes(found.storage_bytes)}, {shown_bytes(found.checkpoint_bytes)} a checkpoint"
    assert rows["Storage"].startswith(stored)
    assert rows["Memory of a worker"] == f"about {sum(found.memory.values()) / 1e9:.1f} GB"
    # Known from now on.
    resolved = here.desk.check(
        submission.check(submission.fields_of({"base": "", "yaml": LINES}, here.desk.settings), here.desk).spec
    )  # type: ignore[arg-type]
    assert here.app.state.estimator.known(resolved, None) is not None
    assert "Steps" in send(here, "validate", 200, base="", yaml=LINES).shown


def test_an_address_that_the_operator_has_not_declared_is_never_asked(here: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/set"
        for action in ("validate", "check"):
            page = send(here, action, 200, overrides=f"data.name=prepared\ndata.options={{}}\ndata.root={url}")
            assert "data_urls" in told(page)["overrides"]
        with pytest.raises(BlockingIOError):
            listening.accept()


WORKERS_ONLY = runpy.run_path(str(Path(__file__).parents[2] / "docker/requirements.py"))["WORKERS_ONLY"]
# What the service's image is without cannot be found, whoever asks for it.
WITHOUT = f"""
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[*(one.replace("-", "_") for one in WORKERS_ONLY), "nvidia"]}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refusing())
"""


def test_where_there_is_no_torch_only_what_the_network_takes_is_left_open(
    here: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(WITHOUT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    page = send(here, "check", 200, base="", yaml=LINES)
    rows = dict(zip([row.text for row in page.all("dt")], [row.text for row in page.all("dd")], strict=True))
    whole = dict(amounts.examine(TINY, None).rows)
    network = {"Model", "Memory of a worker", "Storage"}
    assert whole.keys() - rows.keys() == network - {"Model"}
    assert rows["Model"] == "resnet_small"
    assert {name: text for name, text in rows.items() if name != "Model"} == {
        name: text for name, text in whole.items() if name not in network
    }
    assert {"Data, train", "Data, val", "Global batch", "Steps", "Learning rate"} <= rows.keys()
    assert "memory and storage are not worked out here" in page.shown
    assert "torch is not installed" in page.shown
    # Installing nothing would change it: it is remembered.
    assert "Steps" in send(here, "validate", 200, base="", yaml=LINES).shown


def test_who_works_it_out_reads_artifacts_where_the_service_may_and_nowhere_else(
    here: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    done = subprocess.CompletedProcess(
        [], 0, '{"rows": [], "warnings": [], "missing": [], "unknown": "", "problem": ""}'
    )
    monkeypatch.setattr(amounts.subprocess, "run", lambda *_, env, **__: seen.append(env) or done)
    amounts.Estimator("http://mlflow.lan", ("/mnt/shared",)).ask({}, None)
    assert [env["LOROT_ARTIFACT_ROOTS"] for env in seen] == ['["/mnt/shared"]']
    send(here, "check", 200, base="", yaml=LINES)
    assert [env["LOROT_ARTIFACT_ROOTS"] for env in seen[1:]] == ["[]"]


def test_only_so_many_answers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amounts, "_REMEMBERED", 2)
    monkeypatch.setattr(
        amounts,
        "_ask",
        lambda resolved, workers, told: (amounts.Amounts((("n", str(resolved["n"])),)), resolved["n"] != 2),
    )
    estimator = amounts.Estimator("")
    for number in range(4):
        assert estimator.ask({"n": number}, None).rows == (("n", str(number)),)
    # 2 would not be the same again; 0 was the oldest.
    assert [estimator.known({"n": number}, None) is not None for number in range(4)] == [False, True, False, True]
