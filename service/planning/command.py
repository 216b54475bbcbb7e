"""`lorot plan`: its options, and how a plan is shown. Imports no torch, and nothing else that is slow, when loaded."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from service.planning.assembly import Plan


def plan(
    config: Annotated[Path, typer.Argument(help="Configuration file, as configs/quickstart.yaml.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values on top.", show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of each node (on CPUs: workers).", min=1)] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes.", min=1)] = 1,
    gpu: Annotated[str | None, typer.Option(help="H100, A100, A100-40GB, V100, V100-16GB or P100.")] = None,
    flops: Annotated[float | None, typer.Option(help="TFLOP/s that a GPU sustains, in place of --gpu.")] = None,
    images_per_s: Annotated[
        float | None, typer.Option(help="What a GPU trains of this configuration at data.size, in place of --gpu.")
    ] = None,
    interconnect: Annotated[
        float | None, typer.Option(help="GB/s between a node's GPUs, one way; default: the GPU's NVLink.")
    ] = None,
    network: Annotated[float | None, typer.Option(help="GB/s of each node to the others; default: 12.5.")] = None,
    cores: Annotated[int | None, typer.Option(help="CPU cores of each node; default: as many as it takes.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Training images; default: those that are there, or ImageNet's number.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine, and plan for nodes like it: about a minute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict what CONFIG would take on N GPUs of M nodes: step and run time, memory, storage, network. Starts nothing.

    All that had to be assumed is printed. As in `lorot plan configs/train/imagenet-lorot_e.yaml --gpus 8 --gpu A100`.
    """
    from service import config as configuration
    from service.planning import assembly, calibration

    wish = assembly.Wish(gpus, nodes, gpu, flops, images_per_s, interconnect, network, cores, samples)
    job = configuration.load(config, overrides or ())
    # What cannot be is refused before anything is measured.
    configuration.accumulation_steps(job, gpus * nodes)
    measured = None
    if measure:
        measured = calibration.measure(config, overrides or (), gpus, say=lambda text: typer.echo(text, err=True))
    found = assembly.assemble(job, wish, measured)
    if as_json:
        typer.echo(json.dumps(summary(found), indent=1))
    else:
        show(found, Console())


def summary(found: "Plan") -> dict[str, Any]:
    """The plan as JSON values; seconds, bytes, images."""
    last = found.last
    return {
        "gpus": found.wish.gpus,
        "nodes": found.wish.nodes,
        "device": found.device,
        "precision": found.precision,
        "accumulation": found.accumulation,
        "parameters": found.network.parameters,
        "forward_flops": found.network.forward_flops,
        "training_flops": found.network.training_flops,
        "forwarded_per_image": found.forwarded,
        "step_s": last.seconds,
        "computing_s": last.computing,
        "averaging_s": last.averaging,
        "averaging_exposed_s": last.exposed,
        "averaging_share": last.averaging_share,
        "updating_s": last.updating,
        "loading_s": last.loading,
        "images_per_s": last.images_per_s,
        "steps": sum(count for _, count, _ in found.steps),
        "parts": [{"size": size, "steps": count, "step_s": part.seconds} for size, count, part in found.steps],
        "train_s": found.train_s,
        "evaluations": found.evaluations,
        "evaluate_s": found.evaluate_s,
        "total_s": found.total_s,
        "memory_bytes": found.memory,
        "memory_limit_bytes": found.memory_limit or None,
        "checkpoint_bytes": found.checkpoint_bytes,
        "checkpoints": found.checkpoints,
        "storage_bytes": found.storage_bytes,
        "data_bytes": found.data_bytes,
        "read_bytes_per_s": found.read_bytes_per_s,
        "loading_cores": found.loading_cores,
        "averaged_bytes": found.averaged_bytes,
        "network_bytes_per_s": found.network_bytes_per_s,
        "assumptions": list(found.assumptions),
        "warnings": list(found.warnings),
    }


def show(found: "Plan", console: Console) -> None:
    """Print the plan for people."""
    from rich.table import Table

    job, wish = found.job, found.wish
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(found):
        table.add_row(label, text)
    where = f"{wish.gpus} {'worker' if found.device == 'cpu' else 'GPU'}{'s' if wish.gpus > 1 else ''}"
    on = f"{where} on each of {wish.nodes} nodes" if wish.nodes > 1 else f"{where} on one node"
    console.print(f"{job.name}: {on}, predicted", markup=False, style="bold", highlight=False)
    console.print(table, markup=False, highlight=False)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    console.print("assumed:", style="bold")
    for note in found.assumptions:
        console.print(f"- {note}", markup=False, highlight=False)


def _lines(found: "Plan") -> list[tuple[str, str]]:
    from pipelines.amounts import shown_bytes

    job, net, last = found.job, found.network, found.last
    size, world = found.steps[-1][0], found.world
    passes = f", {found.forwarded} forwarded for each of the batch" if found.forwarded > 1 else ""
    steps = sum(count for _, count, _ in found.steps)
    parts = ", ".join(f"{name} {shown_bytes(value)}" for name, value in found.memory.items() if value)
    memory = f"about {shown_bytes(sum(found.memory.values()))}: {parts}"
    lines = [
        (
            "model",
            f"{job.model.name} at {size} pixels: {_number(net.parameters)} parameters, "
            f"{_number(net.forward_flops / 2)} multiply-adds forward, {_number(net.training_flops / 2)} forward and "
            f"backward{passes}",
        ),
        (
            "global batch",
            f"{job.global_batch} = {world} workers x micro-batch {job.micro_batch} x accumulation "
            f"{found.accumulation}, {found.precision}",
        ),
        ("step", f"{duration(last.seconds)}: {_parts(last)}"),
        ("images/s", f"{last.images_per_s:,.0f}, {last.images_per_s / world:,.0f} a worker"),
        (
            "time to train",
            f"{duration(found.total_s)}: {steps:,} steps {duration(found.train_s)}, {found.evaluations} evaluations "
            f"{duration(found.evaluate_s)}",
        ),
    ]
    if len(found.steps) > 1:
        each = ", ".join(f"{count:,} at {side} pixels of {duration(part.seconds)}" for side, count, part in found.steps)
        lines.append(("steps", each))
    lines.append(
        ("memory a worker", memory + (f"; it has {shown_bytes(found.memory_limit)}" if found.memory_limit else ""))
    )
    if world > 1:
        text = (
            f"{shown_bytes(found.averaged_bytes)} a step from each worker, {last.averaging_share:.1%} of the step waits"
        )
        if found.wish.nodes > 1:
            sent = found.network_bytes_per_s
            text += f"; {shown_bytes(sent)}/s ({8 * sent / 1e9:.1f} Gbit/s) a node"
        lines.append(("averaging", text))
    if found.loading_cores:
        lines.append(
            ("loading", f"{found.loading_cores:.1f} CPU cores, {found.loading_cores / found.wish.nodes:.1f} a node")
        )
    lines += [
        ("reading", f"{shown_bytes(found.read_bytes_per_s)}/s; the training set is {shown_bytes(found.data_bytes)}"),
        (
            "checkpoints",
            f"{found.checkpoints} of {shown_bytes(found.checkpoint_bytes)}; at most "
            f"{shown_bytes(found.storage_bytes)} in {job.folder}",
        ),
    ]
    return lines


def _parts(step: Any) -> str:
    named = {
        "computing": step.computing,
        "waiting for gradients": step.exposed,
        "update": step.updating,
        "loading in parallel": step.loading,
    }
    return ", ".join(f"{name} {duration(value)}" for name, value in named.items() if value)


def _number(count: float) -> str:
    """25557032 -> "25.56 million"."""
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def duration(seconds: float) -> str:
    """A time for people: 12.3 ms, 4.5 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if minutes < 60 * 48:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
