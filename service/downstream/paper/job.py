"""`lorot figures`: asks the models, writes pictures and numbers, and records both beside each model."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from service import bundle, recovery, registry
from service.config import TrackingConfig
from service.downstream.paper import affinity, cam_grid, embedding, pretext_cam
from service.downstream.paper.asking import Drawn, ImpossibleError, Question
from service.downstream.subject import Subject, check_classes, load, open_data
from service.errors import ConfigError, StorageError

KINDS: dict[str, Callable[[Question, Path], Drawn]] = {
    "cam": cam_grid.draw,
    "pretext-cam": pretext_cam.draw,
    "tsne": embedding.draw,
    "affinity": affinity.draw,
}
TASKS = ("rotation", "lorot_i", "lorot_e")


@dataclass(frozen=True)
class Result:
    """What was drawn.

    Attributes:
        folder: holds the files.
        titles: of the models.
        metrics: of each model, by KIND/NAME, as affinity/lorot_e. Fractions, but for t-SNE's divergences.
        files: names of pictures and of JSON files in the folder.
        record_ids: the MLflow run of each model's record.
        notices: what could not be drawn or recorded, for the user.
    """

    folder: Path
    titles: tuple[str, ...]
    metrics: tuple[dict[str, float], ...]
    files: tuple[str, ...]
    record_ids: tuple[str, ...]
    notices: tuple[str, ...]


def run(
    models: Sequence[str],
    *,
    output: Path | str,
    kinds: Sequence[str] = (),
    data: str | None = None,
    root: Path | str | None = None,
    split: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    tasks: Sequence[str] = TASKS,
    images: int = 6,
    limit: int | None = None,
    points: int = 500,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    loader: str = "dali",
    tracking_uri: str | None = None,
    experiment: str = "lorot",
) -> Result:
    """Draw figures of the paper from registered models, and record them beside each of these.

    Args:
        models: addresses as models:/NAME@ALIAS; all see the same images.
        output: folder to fill.
        kinds: of KINDS; none: all that can be drawn of these models.
        data, root, split, data_options: which images; what is not given is what the first model was trained with and
            evaluated on.
        tasks: pretext tasks whose transformations t-SNE and affinity look at.
        images: shown in pictures. limit: that numbers are taken over; None: the whole split. points: of a t-SNE.
        seed: of all draws.

    Raises:
        ConfigError: an unknown kind or task, one that does not fit a model, or a figure that was asked for by name and
            cannot be made; records of earlier figures wait in the folder for the tracking server.
        CheckpointError: no such model.
        DataError: the data is not there, or has other classes than a model.
        StorageError: the folder cannot be written.
        TrackingError: the tracking server does not answer.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"figure {kind!r} does not exist; there are {', '.join(KINDS)}")
    if not models or not tasks or min(images, points, limit or 1, batch_size) < 1:
        raise ConfigError("figures need a model and a task, and at least one image of each kind")
    subjects = tuple(load(uri, tracking_uri, device) for uri in models)
    manifest = open_data(subjects[0], data, root, split, data_options)
    for subject in subjects:
        check_classes(manifest, subject.card.classes, subject.resolved.uri)
    question = Question(
        subjects, labels(subjects), manifest, images, limit, points, tuple(tasks), seed, batch_size, loader
    )
    folder = Path(output)
    for record in sorted(folder.glob("record-*")):
        recovery.refuse_if_waiting(record)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn, notices = _draw(question, tuple(kinds), folder)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write the figures ({error.strerror}); choose another output folder"
        ) from None
    metrics = tuple(
        {f"{kind}/{name}": value for kind, one in drawn.items() for name, value in one.metrics[index].items()}
        for index in range(len(subjects))
    )
    record_ids = []
    for subject, label, found in zip(subjects, question.labels, metrics, strict=True):
        record_id, notice = registry.log_downstream(
            subject.resolved,
            "figures",
            found,
            tracking_config=TrackingConfig(uri=tracking_uri, experiment=experiment),
            folder=folder / f"record-{label}",
            params=settings(question, tuple(drawn), (subject,)),
            tags={"data": manifest.name, "data_digest": manifest.digest, "models": " ".join(models)},
            artifacts=[folder / name for name in _files(drawn)],
            # The divergence of an embedding says nothing of a model.
            headline=[name for name in found if not name.startswith("tsne/")],
        )
        record_ids.append(record_id)
        notices += [notice] if notice else []
    titles = tuple(subject.title for subject in subjects)
    return Result(folder, titles, metrics, _files(drawn), tuple(record_ids), tuple(notices))


def settings(question: Question, kinds: tuple[str, ...], subjects: tuple[Subject, ...]) -> dict[str, Any]:
    """All that the numbers of these models follow from, besides the weights and the images."""
    views = [bundle.evaluation_view(subject.view) for subject in subjects]
    return {
        "kinds": ",".join(kinds),
        "tasks": ",".join(question.tasks),
        "images": question.images,
        "limit": question.limit,
        "points": question.points,
        "seed": question.seed,
        "data": question.manifest.name,
        "split": question.manifest.split,
        **({"view": views[0]} if len(views) == 1 else {"views": views}),
    }


def labels(subjects: Sequence[Subject]) -> tuple[str, ...]:
    """Distinct names for files, one a model."""
    slugs = [re.sub(r"[^A-Za-z0-9._-]", "_", subject.slug) for subject in subjects]
    return tuple(
        f"{slug}-{slugs[:index].count(slug) + 1}" if slugs.count(slug) > 1 else slug for index, slug in enumerate(slugs)
    )


def show(result: Result, console: Console) -> None:
    """Print the numbers, a column a model, and where the figures lie."""
    table = Table()
    table.add_column("")
    for title in result.titles:
        table.add_column(title, justify="right")
    for name in dict.fromkeys(name for found in result.metrics for name in found):
        table.add_row(name, *(f"{found[name]:.4g}" if name in found else "" for found in result.metrics))
    console.print(table)
    console.print(f"{result.folder}: {', '.join(result.files)}", markup=False, highlight=False, soft_wrap=True)
    for notice in result.notices:
        console.print(notice, style="yellow", markup=False, highlight=False)


def _draw(question: Question, kinds: tuple[str, ...], folder: Path) -> tuple[dict[str, Drawn], list[str]]:
    """The figures that were asked for, or all that are possible; and what is missing."""
    drawn, notices = {}, []
    for kind in kinds or tuple(KINDS):
        try:
            one = KINDS[kind](question, folder)
        except ImpossibleError as error:
            if kinds:
                raise
            notices.append(f"no figure {kind}: {error}")
            continue
        about = {
            "kind": kind,
            **settings(question, (kind,), question.subjects),
            "data_digest": question.manifest.digest,
        }
        (folder / f"{kind}.json").write_text(json.dumps({**about, **one.numbers}, indent=1))
        drawn[kind] = one
        notices += [one.notice] if one.notice else []
    return drawn, notices


def _files(drawn: Mapping[str, Drawn]) -> tuple[str, ...]:
    return tuple(name for kind, one in drawn.items() for name in (*one.pictures, f"{kind}.json"))
