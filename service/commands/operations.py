"""`lorot backup`, `lorot restore` and `lorot gc`: what an operator of the job service does now and then."""

import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.operations.deleted_runs import Deleted
    from service.operations.garbage import Findings, Item

Settings = Annotated[
    Path | None,
    typer.Option(envvar="LOROT_SETTINGS", help="Settings file, as configs/service.yaml; default: the defaults."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings on top.", show_default=False)
]
# An argument is seen by all users of the machine, with the password that it may hold; a variable is not.
_DATABASE = "LOROT_DATABASE"
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def add_to(app: typer.Typer) -> None:
    """Make the commands of `app`."""
    app.command()(backup)
    app.command()(restore)
    app.command()(gc)


def backup(
    target: Annotated[Path, typer.Argument(help="A new file, or a folder that is there.", show_default=False)],
    overrides: Overrides = None,
    settings: Settings = None,
    database: Annotated[
        str | None,
        typer.Option(envvar=_DATABASE, help="Tracking database; needed if the service speaks to a tracking server."),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(help="The tracking server's --artifacts-destination: a folder, or s3://BUCKET/FOLDER."),
    ] = None,
    without_artifacts: Annotated[
        bool, typer.Option("--without-artifacts", help="Leave artifacts and registered models out.")
    ] = False,
    with_jobs: Annotated[
        bool, typer.Option("--with-jobs", help="Put the folders of jobs in: checkpoints, logs.")
    ] = False,
) -> None:
    """Write the tracking database, artifacts, tokens and settings to one archive, while the service and jobs go on.

    As in `lorot backup /backups --settings configs/service.yaml`. Secrets are not in it.
    """
    from service.jobs import settings_file
    from service.operations.backup import back_up

    if without_artifacts and artifacts is not None:
        raise typer.BadParameter("cannot be left out and named at once", param_hint="--artifacts")
    _heed_sigterm()
    back_up(
        settings_file.load(settings, overrides or ()),
        target,
        database_uri=database,
        artifacts=artifacts,
        with_artifacts=not without_artifacts,
        with_jobs=with_jobs,
        say=typer.echo,
    )


def restore(
    source: Annotated[Path, typer.Argument(help="Archive of `lorot backup`.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="A new or an empty folder.", show_default=False)],
    database: Annotated[
        str | None,
        typer.Option(
            envvar=_DATABASE, help="Empty PostgreSQL database, if the backup is of one: postgresql://HOST/NAME."
        ),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(help="Where the tracking server's artifacts go: s3://BUCKET/FOLDER, empty; default: FOLDER."),
    ] = None,
) -> None:
    """Check an archive of `lorot backup` and put it into a folder, from which the service is started then.

    End the old service and its jobs first, if they still run. Nothing that is there is written over.
    """
    from service.operations import restore as restoring

    _heed_sigterm()
    done = restoring.restore(source, folder, database_uri=database, artifacts=artifacts, say=typer.echo)
    typer.echo(f"{folder}: {done.num_files} files, {done.num_bytes / 1e6:.1f} MB, all as they were written")
    if done.server_artifacts is not None:
        typer.echo(
            f"tracking server: mlflow server --backend-store-uri {done.database_uri} "
            f"--artifacts-destination {done.server_artifacts}"
        )
    where = "" if done.names_tracking else "MLFLOW_TRACKING_URI=ADDRESS "
    typer.echo(f"service: {where}lorot serve --settings {done.settings}")


def gc(
    overrides: Overrides = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, with sizes; remove nothing.")] = False,
    older_than: Annotated[str, typer.Option(help="Since a job's end: 12h, 30d, 8w.")] = "30d",
    keep_last: Annotated[int, typer.Option(help="Newest checkpoints of each run that stay in any case.", min=0)] = 0,
    experiment: Annotated[
        list[str] | None, typer.Option(help="Only jobs of this experiment; may be given again.")
    ] = None,
    drop_resumable: Annotated[
        bool, typer.Option("--drop-resumable", help="Also what failed and stopped jobs would go on from.")
    ] = False,
    log_mb: Annotated[float, typer.Option(help="What stays of each attempt's log: its end.", min=0.01)] = 10.0,
) -> None:
    """Remove what ended jobs do not need any more: checkpoints, long logs, folders without a record, fetched models.

    Never: anything of jobs that wait or run, what a job would go on from, artifacts, registered models. With --dry-run
    it also says what runs that were deleted in MLflow still keep of artifacts, and how MLflow removes that.
    """
    from service import artifact_places, store
    from service.jobs import settings_file
    from service.operations import deleted_runs, garbage
    from service.operations.lookup import Lookup

    read = settings_file.load(settings, overrides or ())
    rules = garbage.Rules(
        older_than_s=_seconds(older_than),
        keep_last=keep_last,
        experiments=tuple(experiment or ()),
        drop_resumable=drop_resumable,
        log_bytes=round(log_mb * 1e6),
    )
    uri = store.absolute(read.tracking_uri or store.default_uri())
    lookup = Lookup(uri)
    jobs = lookup.jobs()
    found = garbage.find(read, jobs, rules, lookup.is_unknown)
    if dry_run:
        for item in found.items:
            _show(item)
        _sum_up(found, "would be freed; nothing was removed")
        deleted = deleted_runs.find(
            uri,
            artifact_places.absolute(read.artifact_roots),
            older_than_s=rules.older_than_s,
            experiments=rules.experiments,
            needed=garbage.named_by(job for job in jobs if not job.has_ended),
        )
        _tell_of(deleted, is_server=uri.startswith(("http://", "https://")))
        return
    problems = garbage.remove(found, lookup.has_ended, rules, say=_show)
    _sum_up(found, "freed" if not problems else "were to be freed")
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(7)


def _heed_sigterm() -> None:
    """Let SIGTERM end this as an exception does, so that nothing half-made is left."""
    # The first process of a container would not even hear it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))


def _show(item: "Item") -> None:
    typer.echo(f"{item.kind:10}  {item.num_bytes / 1e6:12.3f} MB  {item.path}  ({item.why})")


def _sum_up(found: "Findings", what: str) -> None:
    for note in found.notes:
        typer.echo(f"note: {note}")
    things = "thing" if len(found.items) == 1 else "things"
    typer.echo(f"{len(found.items)} {things}, {found.num_bytes / 1e6:.3f} MB {what}")


def _tell_of(deleted: "Deleted", *, is_server: bool) -> None:
    for run in deleted.runs:
        typer.echo(f"artifacts   {run.num_bytes / 1e6:12.3f} MB  {run.place}  (deleted run {run.id}, {run.name})")
    for note in deleted.notes:
        typer.echo(f"note: {note}")
    if deleted.runs:
        runs = "run keeps" if len(deleted.runs) == 1 else "runs keep"
        typer.echo(
            f"{len(deleted.runs)} deleted {runs} {deleted.num_bytes / 1e6:.3f} MB of artifacts; they are MLflow's"
        )
    if deleted.commands:
        where = " (DATABASE: the tracking server's --backend-store-uri)" if is_server else ""
        typer.echo(f"to remove them, with those runs and beyond recall{where}:")
        for command in deleted.commands:
            typer.echo(command)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    if match is None:
        raise typer.BadParameter(f"{text!r}: write a number and s, m, h, d or w, as 30d", param_hint="--older-than")
    return int(match[1]) * _UNITS_S[match[2]]
