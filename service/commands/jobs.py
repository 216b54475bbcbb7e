"""`lorot submit`, `jobs`, `logs`, `cancel`, `retry`, `resume`: with a job service, or without one on this machine."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from service.commands import job_service, job_tables
from service.commands.terminal_text import harmless
from service.errors import ConfigError
from service.jobs import traits

if TYPE_CHECKING:
    from service.api.serverless import Serverless
    from service.client import Client

    Service = Client | Serverless

_COMMAND = "lorot.command"
_BACKENDS = traits.either(traits.NAMES)

Server = Annotated[
    str | None,
    typer.Option(
        envvar="LOROT_SERVER", metavar="URL", help="Job service, as http://HOST:8080; default: none, on this machine."
    ),
]
TokenFile = Annotated[Path | None, typer.Option(help="File that holds the token; default: LOROT_TOKEN.")]
Settings = Annotated[
    Path | None,
    typer.Option(envvar="LOROT_SETTINGS", help="Without a service: settings as configs/service.yaml has them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, or six digits of it.", show_default=False)]
JobIds = Annotated[
    list[str], typer.Argument(metavar="ID...", help="Ids of jobs, or six digits of each.", show_default=False)
]


class SubmitCommand(TyperCommand):
    """What follows `--` is a program with its arguments, however it looks."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Set the program aside before the options are read."""
        if "--" in args:
            at = args.index("--")
            ctx.meta[_COMMAND] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)


def add_to(app: typer.Typer) -> None:
    """Make the commands of jobs, and those of the service, commands of `app`."""
    app.command(cls=SubmitCommand)(submit)
    app.command()(jobs)
    app.command()(job)
    app.command()(logs)
    app.command()(cancel)
    app.command()(retry)
    app.command()(resume)
    job_service.add_to(app)


@contextlib.contextmanager
def service(server: str | None, token_file: Path | None, settings: Path | None) -> Iterator["Service"]:
    """The job service at `server`, or what does the same here without one."""
    if server:
        from service.client import Client

        found: Service = Client(server, job_service.token(token_file))
    else:
        from service.api.serverless import Serverless
        from service.jobs import settings_file

        found = Serverless(settings_file.load(settings))
    try:
        yield found
    finally:
        found.close()


def submit(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="Configuration file, as configs/quickstart.yaml.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]... [-- COMMAND...]", show_default=False)
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="train, detect, segment or container; default: as CONFIG or COMMAND says.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="detect, segment: as models:/NAME@best.")] = None,
    backend: Annotated[str | None, typer.Option(help=f"{_BACKENDS}; default: local, of a COMMAND docker.")] = None,
    image: Annotated[str | None, typer.Option(help="Of containers; default: the service's.")] = None,
    nodes: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="Machines.")] = "1",
    workers: Annotated[int | None, typer.Option(help="Processes of a node; default: one per GPU.", min=1)] = None,
    gpus: Annotated[int, typer.Option(help="Of each node.", min=0)] = 0,
    cpus: Annotated[float, typer.Option(help="Cores of each node.", min=0)] = 1.0,
    memory: Annotated[str | None, typer.Option(help="Most that a node may use, as 64GB.")] = None,
    shm: Annotated[str | None, typer.Option(help="/dev/shm of a container, as 8GB; default: 2GB.")] = None,
    priority: Annotated[int, typer.Option(help="Higher ones start first.")] = 0,
    retries: Annotated[int, typer.Option(help="How often it is started again after a failure.", min=0)] = 3,
    grace: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="From a request to stop to the kill; default: 30.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="For people; default: name=..., else the file's.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow experiment; default: the service's.")] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be given again; no secrets.")] = None,
    secret: Annotated[
        list[str] | None, typer.Option(metavar="KEY=NAME", help="A variable that is the service's secret NAME.")
    ] = None,
    mount: Annotated[list[str] | None, typer.Option(help="Of containers (docker): a host folder to be seen.")] = None,
    output: Annotated[list[str] | None, typer.Option(help="COMMAND: file or folder below /results to keep.")] = None,
    key: Annotated[str | None, typer.Option(help="The same key makes one job, however often it is sent.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended; the exit code is the job's.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted: the job, or its manifests (kubernetes).")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="Of manifests: objects, as the service makes them; trainjob, for Kubeflow.")
    ] = "objects",
    as_json: AsJson = False,
    server: Server = None,
    token_file: TokenFile = None,
    settings: Settings = None,
) -> None:
    """Hand in a job: train as CONFIG says, or run COMMAND in a container; print its id.

    As in `lorot submit configs/quickstart.yaml seed=1 --gpus 1 --wait`, or
    `lorot submit --image mine:1 --output model -- python /app/train.py`, a program that the image has.
    """
    from service.commands import submitting

    wish = submitting.Wish(
        config=config,
        overrides=tuple(overrides or ()),
        command=context.meta.get(_COMMAND, ()),
        kind=kind,
        backend=backend,
        name=name,
        environment=tuple(env or ()),
        secrets=tuple(secret or ()),
        others={"model": model, "image": image, "nodes": nodes, "workers": workers, "priority": priority}
        | {"retries": retries, "grace_s": grace}
        | {"experiment": experiment, "mounts": mount or (), "outputs": output or ()},
        resources={"gpus": gpus, "cpus": cpus, "memory": memory, "shm": shm},
    )
    spec = submitting.spec(wish)
    if dry_run:
        submitting.check_choices(format=form)
        sender = job_service.token(token_file) if server else ""
        told = submitting.preview(spec, form=form, as_json=as_json, server=server, token=sender, settings=settings)
        typer.echo(told, nl=False)
        return
    with service(server, token_file, settings) as desk:
        made, is_new = desk.submit(spec.model_dump(mode="json"), key or submitting.new_key())
        if as_json and not wait:
            typer.echo(json.dumps(made, indent=1))
        else:
            options = job_service.given_here(server, token_file, settings)
            typer.echo(job_tables.submitted(made, is_new, options), err=as_json)
        if wait:
            ended = submitting.await_end(desk, made, say=lambda text: typer.echo(text, err=True))
            if as_json:
                typer.echo(json.dumps(ended, indent=1))
            submitting.end_as(ended)


def jobs(
    job_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Show this one; of several, what differs.", show_default=False),
    ] = None,
    state: Annotated[
        str | None, typer.Option(help="queued, starting, running, stopping, finished, failed, killed.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="train, detect, segment or container.")] = None,
    backend: Annotated[str | None, typer.Option(help=f"{_BACKENDS}.")] = None,
    owner: Annotated[str | None, typer.Option(help="Name of the token it was submitted with.")] = None,
    name: Annotated[str | None, typer.Option(help="A part of the job's name.")] = None,
    limit: Annotated[int, typer.Option(help="So many at most.", min=1)] = 50,
    as_json: AsJson = False,
    server: Server = None,
    token_file: TokenFile = None,
    settings: Settings = None,
) -> None:
    """List jobs, the newest first; show one; or compare several: settings that differ, and their metrics."""
    if job_ids and len(job_ids) == 1:
        job(job_ids[0], as_json, server, token_file, settings)
        return
    if job_ids:
        with service(server, token_file, settings) as desk:
            compared = desk.compare(job_ids)
        _show(compared, as_json, job_tables.show_compared)
        return
    from service.commands import submitting

    asked = {"state": state, "kind": kind, "backend": backend, "owner": owner, "name": name}
    submitting.check_choices(state=state, kind=kind, backend=backend)
    with service(server, token_file, settings) as desk:
        found: list[dict[str, Any]] = []
        page = desk.page(**asked, limit=min(limit, 200))
        found += page["jobs"]
        while len(found) < limit and page["next"]:
            page = desk.page(cursor=page["next"], **asked, limit=min(limit - len(found), 200))
            found += page["jobs"]
    if as_json:
        typer.echo(json.dumps(page | {"jobs": found}, indent=1))
    else:
        job_tables.show_list(found, page["total"], Console(), is_partial=bool(page.get("partial")))


def job(
    job_id: JobId,
    as_json: AsJson = False,
    server: Server = None,
    token_file: TokenFile = None,
    settings: Settings = None,
) -> None:
    """Show one job: how it stands, its attempts, how far it is."""
    with service(server, token_file, settings) as desk:
        found = desk.job(job_id)
    _show(found, as_json, job_tables.show_one)


def _show(found: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any], Console], None]) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show(found, Console())


def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    tail: Annotated[int | None, typer.Option(help="Only the last so many lines.", min=0)] = None,
    node: Annotated[int, typer.Option(help="Of a job on several nodes.", min=0)] = 0,
    attempt: Annotated[int | None, typer.Option(help="Default: the newest.", min=1)] = None,
    server: Server = None,
    token_file: TokenFile = None,
    settings: Settings = None,
) -> None:
    """Print what a job has written; on a terminal without what that would obey."""
    with service(server, token_file, settings) as desk:
        pieces = desk.logs(job_id, attempt=attempt, node=node, tail=tail, follow=follow)
        for piece in harmless(pieces) if sys.stdout.isatty() else pieces:
            sys.stdout.buffer.write(piece)
            if follow:
                sys.stdout.buffer.flush()
        sys.stdout.buffer.flush()


def cancel(
    job_ids: JobIds,
    as_json: AsJson = False,
    server: Server = None,
    token_file: TokenFile = None,
    settings: Settings = None,
) -> None:
    """Stop jobs: they are asked to, and killed after their grace period."""
    _change(job_ids, lambda desk, job_id: desk.cancel(job_id), as_json, server, token_file, settings)


def retry(
    job_ids: JobIds,
    as_json: AsJson = False,
    server: Server = None,
    token_file: TokenFile = None,
    settings: Settings = None,
) -> None:
    """Start jobs that failed or were stopped anew, from the beginning."""
    _change(job_ids, lambda desk, job_id: desk.retry(job_id), as_json, server, token_file, settings)


def resume(
    job_ids: JobIds,
    as_json: AsJson = False,
    server: Server = None,
    token_file: TokenFile = None,
    settings: Settings = None,
) -> None:
    """Go on with jobs that failed or were stopped, from their last checkpoint."""
    _change(job_ids, lambda desk, job_id: desk.resume(job_id), as_json, server, token_file, settings)


def _change(
    job_ids: list[str],
    change: Callable[["Service", str], dict[str, Any]],
    as_json: bool,
    server: str | None,
    token_file: Path | None,
    settings: Path | None,
) -> None:
    """Change each of the jobs, also behind one that is refused; what was refused is told at the end."""
    from service.client import UnknownTokenError
    from service.jobs.job import ENDED

    changed: list[dict[str, Any]] = []
    refused: list[ConfigError] = []
    with service(server, token_file, settings) as desk:
        for job_id in job_ids:
            try:
                one = change(desk, job_id)
            except UnknownTokenError:
                # Of all jobs alike; and each wrong token counts against the address that it comes from.
                raise
            except ConfigError as error:
                refused.append(error)
                continue
            changed.append(one)
            if not as_json:
                asked = ", asked to stop" if one["cancel"] and one["state"] not in ENDED else ""
                typer.echo(f"{one['id'][: job_tables.SHORT]} {one['state']}{asked}")
    if as_json:
        typer.echo(json.dumps(changed, indent=1))
    if refused:
        raise type(refused[0])("\n".join(dict.fromkeys(map(str, refused))))
