"""What `lorot check` prints."""

from rich.console import Console
from rich.table import Table

from pipelines.amounts import shown_bytes
from service.check.findings import Findings, Plan, sparkline
from service.config import DetectionConfig, JobConfig, TrainingConfig
from service.data_config import AugmentConfig


def show(found: Findings, console: Console) -> None:
    """Print the findings."""
    job: TrainingConfig = found.job
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(found):
        table.add_row(label, text)
    about = f"{job.objective.name}, pretext {job.pretext.name}" if isinstance(job, JobConfig) else job.job
    console.print(f"{job.name}: {about}", markup=False, style="bold")
    console.print(table, markup=False, highlight=False)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    for reason in found.missing:
        console.print(f"missing: {reason}", style="red", markup=False, highlight=False)


def _lines(found: Findings) -> list[tuple[str, str]]:
    job, plan = found.job, found.plan
    lines = [
        (f"data {split.name}", f"{split.samples:,} samples, {split.classes} classes; {split.note}")
        for split in found.splits
    ]
    lines += _network(found)
    batch = f"{found.workers} workers x micro-batch {job.micro_batch} x accumulation {found.accumulation}"
    lines.append(("global batch", f"{job.global_batch} = {batch}"))
    if plan is not None:
        per_epoch = plan.samples_per_epoch / job.global_batch
        shape = f"{job.schedule.name}, {job.optimizer.name}, peak {job.optimizer.lr:g}"
        lines += [
            (
                "steps",
                f"{plan.total_steps:,} ({job.duration}; {per_epoch:,.1f} an epoch of {plan.samples_per_epoch:,})",
            ),
            ("evaluations", f"{plan.evaluations}, every {job.evaluate_every}"),
            ("learning rate", f"{sparkline(plan.rates)}  {shape}"),
        ]
        if saves := _saves(job, plan):
            kept = f"the last {job.checkpoint.keep_last} and the best stay"
            lines.append(("checkpoints", f"{saves}; {kept}"))
    parts = ", ".join(f"{name} {shown_bytes(size)}" for name, size in found.memory.items() if size)
    stored = (
        f"about {shown_bytes(found.storage_bytes)} in {job.folder}, {shown_bytes(found.checkpoint_bytes)} a checkpoint"
    )
    lines += [
        ("memory a worker", f"about {shown_bytes(sum(found.memory.values()))}: {parts}"),
        ("storage", f"{stored}; {shown_bytes(found.free_bytes)} free"),
        _recorded(job),
    ]
    return lines


def _network(found: Findings) -> list[tuple[str, str]]:
    """The input, and what sees it."""
    job = found.job
    assumed = "" if found.splits else " (assumed)"
    model = f"{job.model.name}, {found.classes} classes{assumed}, {found.parameters:,} parameters"
    if isinstance(job, DetectionConfig):
        sides = ", ".join(map(str, job.data.short_sides))
        drawn = f"short side {sides}" if len(job.data.short_sides) == 1 else f"short side drawn of {sides}"
        return [
            ("input", f"{drawn} pixels, long side at most {job.data.long_side}"),
            ("model", f"{model}, {found.trained_parameters:,} of them trained"),
            ("begins with", found.trunk),
        ]
    assert isinstance(job, JobConfig), "these are all kinds there are"
    head = f", {found.pretext_parameters:,} of them in the pretext head" if found.pretext_parameters else ""
    lines = [("input", _input(job))]
    if job.data.augment:
        lines.append(("augmented by", ", then ".join(_augmentation(part) for part in job.data.augment)))
    return [*lines, ("model", f"{model}{head}")]


def _recorded(job: TrainingConfig) -> tuple[str, str]:
    """Where the result goes."""
    if isinstance(job, DetectionConfig):
        return "recorded at", f"{job.model.backbone}, as downstream.{job.job}.*"
    assert isinstance(job, JobConfig), "these are all kinds there are"
    return "registered as", job.model_name or "not registered"


def _saves(job: TrainingConfig, plan: Plan) -> str:
    """When it saves, by count and by the clock; empty if never before the end."""
    minutes = job.checkpoint.every_minutes
    scheduled = f"{plan.checkpoints}, every {job.checkpoint.every}" if plan.checkpoints else ""
    timed = "" if minutes is None else f"{minutes:g} minute{'' if minutes == 1 else 's'} after the last one"
    return f"{scheduled}, and {timed}" if scheduled and timed else scheduled or timed


def _input(job: JobConfig) -> str:
    """Sides of the network's input over the training, and what differs in evaluation."""
    parts = [f"{part.size} until {part.until}" for part in job.data.sizes]
    text = ", ".join([*parts, f"then {job.data.size}" if parts else f"{job.data.size}"]) + " pixels a side"
    if job.data.eval_size not in (None, job.data.size):
        text += f"; evaluation at {job.data.eval_size}"
    if job.data.repeats > 1:
        text += f"; each image {job.data.repeats} times in a row, augmented anew"
    return text


def _augmentation(part: AugmentConfig) -> str:
    options = ", ".join(f"{name} {value}" for name, value in part.options.items())
    return f"{part.name} ({options})" if options else part.name
