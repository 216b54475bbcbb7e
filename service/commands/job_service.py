"""`lorot serve` and `lorot token`."""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

Settings = Annotated[
    Path | None,
    typer.Option(envvar="LOROT_SETTINGS", help="Settings file, as configs/service.yaml; default: the defaults."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings on top.", show_default=False)
]
Server = Annotated[
    str | None,
    typer.Option(envvar="LOROT_SERVER", metavar="URL", help="Of this job service; default: of the state's folder."),
]
TokenFile = Annotated[Path | None, typer.Option(help="File that holds an admin's token; default: LOROT_TOKEN.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class ServeCommand(TyperCommand):
    """A command that takes the service's settings: its help goes on to explain every key."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the command's own help, then the settings."""
        super().format_help(ctx, formatter)
        from rich.table import Table

        from service import help
        from service.jobs.settings import complete

        console = Console()
        console.print("[bold]Settings[/bold], in the file or as key.sub=value")
        table = Table(show_edge=False, pad_edge=False, expand=True)
        for heading, ratio in (("key", 5), ("type", 3), ("default", 3), ("meaning", 8)):
            table.add_column(heading, ratio=ratio, overflow="fold")
        for key, kind, default, meaning in help.describe(complete()):
            table.add_row(key, kind.replace("|", " | "), default, meaning)
        console.print(table, markup=False)


def add_to(app: typer.Typer) -> None:
    """Make both commands of `app`."""
    app.command(cls=ServeCommand)(serve)
    tokens = typer.Typer(
        help="Make, list and revoke the tokens that clients of the job service send.", no_args_is_help=True
    )
    tokens.command("create")(create)
    tokens.command("list")(show)
    tokens.command("revoke")(revoke)
    app.add_typer(tokens, name="token")


def serve(
    overrides: Overrides = None,
    settings: Settings = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all, which takes a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 8080,
) -> None:
    """Run the job service until SIGTERM: HTTP API at /v1, console at /, metrics at /metrics. Jobs go on afterwards."""
    from service.api import server
    from service.console import pages
    from service.jobs import settings_file

    server.serve(
        settings_file.load(settings, overrides or ()),
        host=host,
        port=port,
        mount=pages.mount,
        say=lambda text: typer.echo(text, err=True),
    )


def create(
    name: Annotated[str, typer.Argument(help="Whose it is; jobs carry it as their owner.", show_default=False)],
    scope: Annotated[str, typer.Option(help="read; submit: and own jobs; admin: and all jobs and tokens.")] = "submit",
    overrides: Overrides = None,
    settings: Settings = None,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Make a token and print it, this once: what is kept of it is a hash."""
    if server:
        made = _client(server, token_file).create_token(name, scope)
    else:
        made = _tokens(settings, overrides).create(name, scope)
    typer.echo(made)


def show(
    overrides: Overrides = None,
    settings: Settings = None,
    as_json: AsJson = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """List the tokens: whose they are, and what they may."""
    if server:
        found = _client(server, token_file).tokens()
    else:
        kept = _tokens(settings, overrides).list()
        found = [{"name": token.name, "scopes": list(token.scopes), "created": token.created} for token in kept]
    if as_json:
        typer.echo(json.dumps({"tokens": found}, indent=1))
        return
    if not found:
        typer.echo("there are no tokens; `lorot token create NAME --scope submit` makes one")
    for token in found:
        typer.echo(f"{token['name']}  {', '.join(token['scopes'])}  made {token['created']}")


def revoke(
    name: Annotated[str, typer.Argument(help="Whose it is.", show_default=False)],
    overrides: Overrides = None,
    settings: Settings = None,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Let a token be worth nothing any more, at once."""
    if server:
        _client(server, token_file).revoke_token(name)
    else:
        _tokens(settings, overrides).revoke(name)
    typer.echo(f"{name} is revoked")


def given_here(server: str | None, token_file: Path | None, settings: Path | None) -> str:
    """The options by which the next command finds the same jobs, but for what it finds in the environment as well."""
    service = ("LOROT_SERVER", "server", server) if server else ("LOROT_SETTINGS", "settings", settings)
    return "".join(
        f" --{name} {shlex.quote(str(value))}"
        for variable, name, value in (service, ("", "token-file", token_file))
        if value and os.environ.get(variable) != str(value)
    )


def token(file: Path | None) -> str:
    """The token that a command sends: of `file`, else LOROT_TOKEN; empty without either."""
    from service import client

    return client.read_token(file) if file is not None else os.environ.get("LOROT_TOKEN", "").strip()


def _client(server: str, token_file: Path | None) -> Any:
    from service.client import Client

    return Client(server, token(token_file))


def _tokens(settings: Path | None, overrides: list[str] | None) -> Any:
    from service.api.tokens import Tokens
    from service.jobs import settings_file

    return Tokens(settings_file.load(settings, overrides or ()).state / "tokens.json")
