"""What test_backends starts where a fourth backend lies among the others: goes by every door, and tells what it saw.

python tests/service/fleet_program.py; the working folder has a database and service.yaml
"""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import config_file
from service.api import shapes
from service.api.access import Access
from service.api.app import create
from service.cli import app as commands
from service.commands import submitting
from service.console import pages
from service.errors import LorotError
from service.explaining import validated
from service.jobs import backends, checking, settings_file, traits
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.spec import JobSpec
from service.operations.backup import back_up
from service.operations.restore import restore
from tests.service.console_service import browse
from tests.service.html_page import Page
from tests.service.job_specs import CONFIG

SETTINGS = Path("service.yaml")
FLEET: dict[str, Any] = {"backend": "fleet", "config": CONFIG}


def refusal(ask: Callable[[], object]) -> str:
    try:
        return f"taken: {ask()}"
    except LorotError as error:
        return str(error)


def spec(**fields: Any) -> JobSpec:
    return validated(JobSpec, {**FLEET, **fields}, "this job")


def without(*overrides: str) -> Desk:
    return Desk(settings_file.load(SETTINGS, overrides))


def main() -> None:
    settings = settings_file.load(SETTINGS)
    desk = Desk(settings)
    controller = Controller(desk)
    controller.open()
    app = create(desk, controller, Access(settings))
    pages.mount(app)
    client = browse(app)
    schema = app.openapi()["components"]["schemas"]["JobSpec"]["properties"]["backend"]

    form = Page(client.get("/submit").text)
    # What was typed for another backend is not handed in with this one.
    wanted = {"backend": "fleet", "nodes": "2", "workers": "1", "mounts": "/srv", "action": "submit"}
    answer = client.post("/submit", data={**form.fields(), **wanted})
    assert answer.status_code == 303, answer.text
    (job,) = desk.record.jobs()
    for _ in range(3):
        controller.step()
        for busy in list(controller._busy.values()):
            busy.result(60)
    job = desk.get(job.id)
    made: Any = desk.backend("fleet")
    (order,) = made.orders.values()
    read = yaml_of(order.folder)
    restore(back_up(settings, Path("backup.tar")), Path("restored"))
    remote = {**CONFIG, "data": {**CONFIG["data"], "root": "s3://bucket/set"}}
    there = {**CONFIG, "data": {**CONFIG["data"], "root": "/fleet/demo"}}
    print(
        json.dumps(
            {
                "names": traits.NAMES,
                "enabled": backends.enabled(settings),
                "enum": schema["enum"],
                "machines": settings.model_dump()["backends"]["fleet"]["machines"],
                "restored": settings_file.load(Path("restored/service.yaml")).model_dump()["backends"]["fleet"],
                "options": [one.attributes for one in form.elements if one.tag == "option" and of_backend(one)],
                "help": {command: explained(command) for command in ("serve", "submit")},
                "state": job.state,
                "page": Page(client.get(f"/jobs/{job.id}").text).shown,
                "command": order.command,
                "environment": dict(order.environment),
                "output": read["output"],
                "folders": {name: oct((order.folder / name).stat().st_mode)[-3:] for name in (".", "run", "outputs")},
                "cache_gb": checking.resolve(spec(config=remote), settings)["data"]["cache_gb"],
                "root": desk.check(spec(config=there))["data"]["root"],
                "secret": bool(desk.check(spec(secrets={"KEY": "kept-there"}))),
                "container": desk.check(spec(kind="container", command=["true"], config={})) == {},
                "refused": {
                    "nodes": refusal(lambda: desk.check(spec(nodes="9"))),
                    "mounts": refusal(lambda: desk.check(spec(mounts=["/srv"]))),
                    "manifests": refusal(lambda: shapes.checked(desk, spec(), "objects")),
                    "root": refusal(
                        lambda: desk.check(spec(config={**there, "data": {**there["data"], "root": "/x"}}))
                    ),
                    "local container": refusal(lambda: spec(backend="local", image="a:b")),
                    "unknown": refusal(lambda: spec(backend="flete")),
                    "option": refusal(lambda: submitting.check_choices(backend="flete")),
                    "off": refusal(lambda: without("backends.fleet.enabled=false").check(spec())),
                    "unseen": refusal(lambda: without("worker_tracking_uri=null").check(spec())),
                    "section": refusal(lambda: without("backends.flete.enabled=true")),
                    "far section": refusal(lambda: without("backends.qqqqq.enabled=true")),
                    "key": refusal(lambda: without("backends.fleet.machine=3")),
                    "value": refusal(lambda: without("backends.fleet.machines=0")),
                },
            }
        )
    )


def explained(command: str) -> str:
    """What its help says, without spaces and line ends."""
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        commands([command, "--help"])
    return "".join(told.getvalue().split())


def yaml_of(folder: Path) -> dict[str, Any]:
    return dict(config_file.read(folder / "job.yaml"))


def of_backend(option: Any) -> bool:
    return any(element.attributes.get("id") == "backend" for element in option.inside)


if __name__ == "__main__":
    main()
