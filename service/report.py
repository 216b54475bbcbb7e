"""A run's report: one HTML page that holds everything it shows and asks the network for nothing."""

import base64
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipelines import pretext
from service import curves, data_wait, figures, store
from service.errors import EXIT_CODES, DataError, StorageError
from service.figures import Series
from service.run_folder import RunFolder, parse_metrics

# Above this a matrix is no longer readable; the pairs that are mixed up most often are listed alone.
_MOST_CLASSES = 20
_NUM_PAIRS = 10
_ROWS = {
    "top1_loc": "Top-1 localization",
    "top5_loc": "Top-5 localization",
    "gt_known": "GT-known localization",
    "centre_top1_loc": "Centre box, top-1",
    "centre_gt_known": "Centre box, GT-known",
}


def write(run_folder: Path, path: Path, *, wsol: Path | None = None) -> Path:
    """Write the report of a run to `path` and return it. What the run did not leave behind is left out.

    Args:
        run_folder: of a training job: config.yaml, metrics.jsonl, summary.json, error.json, confusion.json,
            samples.png.
        wsol: folder of a localization's results, shown as well.

    Raises:
        DataError: there is no such folder, or one of its files is damaged.
        StorageError: the page cannot be written.
    """
    if not run_folder.is_dir():
        raise DataError(f"{run_folder}: no such run folder; `lorot train` and `lorot quickstart` make them in runs/")
    config = _mapping(run_folder / "config.yaml")
    summary = _mapping(run_folder / "summary.json")
    history = read_history(run_folder / "metrics.jsonl")
    found = None if wsol is None else localization(wsol)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("service"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        name=str(config.get("name", run_folder.name)),
        about=_about(config),
        failure=_failure(RunFolder(run_folder)),
        tiles=_tiles(summary, history, found),
        charts=curves.of_run(history, _num_pretext(config)),
        samples=_data_uri(run_folder / "samples.png"),
        nonfinite=_nonfinite(summary),
        confusion=_confusion(run_folder / "confusion.json"),
        wsol=found,
        cost=cost(summary, history),
        waiting=data_wait.explain(data_wait.median(history)),
        origin=_origin(summary),
        versions=_versions(summary),
        commands=_commands(config, summary, run_folder, found),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file's name in a message need not be UTF-8.
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(f"{path}: cannot write the report ({error.strerror}); choose another place") from None
    return path


def read_history(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, numbers only; none if there is no file. A last line cut short is left out."""
    return parse_metrics(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []


def localization(folder: Path) -> dict[str, Any]:
    """What the page shows of a localization: its wsol.json with charts and pictures; raises DataError if it is none."""
    found = _mapping(folder / "wsol.json")
    if found.get("job") != "wsol":
        raise DataError(f"{folder / 'wsol.json'}: no localization results; `lorot wsol --output {folder}` makes them")
    scores = found["scores"]
    at = {iou: _nearest(found["iou_thresholds"], iou) for iou in (0.3, 0.5, 0.7)}
    series = [
        Series(f"IoU {iou:g}", list(zip(found["cam_thresholds"], [row[k] for row in scores["gt_known"]], strict=True)))
        for iou, k in at.items()
    ]
    ends = found["cam_thresholds"][0], found["cam_thresholds"][-1]
    series.append(Series("centre, IoU 0.5", [(x, scores["centre_box_acc"]) for x in ends], is_reference=True))
    examples = []
    for example in found["examples"]:
        source = _data_uri(folder / example["picture"])
        if source is None:
            continue
        right = example["label"] == example["predicted"]
        answer = example["label"] if right else f"{example['label']}, answered {example['predicted']}"
        about = f"{answer}: the found box overlaps the true one by {example['iou']:.0%}"
        picture = figures.boxed_picture(source, found["view_size"], example["true_boxes"], example["found_box"], about)
        examples.append({"picture": picture, "answer": answer, "right": right, "iou": example["iou"]})
    readings = [
        {
            "axis": reading["axis"],
            "title": reading["title"],
            "thresholds": [f"{threshold:g}" for threshold in reading["thresholds"]],
            "rows": [
                (_ROWS.get(name, name), [f"{100 * value:.2f}" for value in row])
                for name, row in reading["rows"].items()
            ],
        }
        for reading in found["readings"]
    ]
    chart = figures.line_chart("GT-known localization by CAM threshold", series, "CAM threshold", percent=True)
    return {**found, "readings": readings, "chart": chart, "pictures": examples}


def cost(summary: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """(what, how much) of what the run took, as far as it was measured."""
    rates = sorted(record["train/images_per_s"] for record in history if "train/images_per_s" in record)
    waited = data_wait.median(history)
    measured = (
        ("Wall time", summary.get("wall_s"), duration),
        ("CPU time, all cores", summary.get("cpu_core_s"), lambda value: f"{value:,.0f} core-seconds"),
        ("Peak memory", summary.get("peak_memory_bytes"), memory),
        ("Images trained on", summary.get("images"), lambda value: f"{value:,.0f}"),
        ("Training speed, median", rates[len(rates) // 2] if rates else None, lambda value: f"{value:,.0f} images/s"),
        (
            "Time spent waiting for data, median",
            waited,
            lambda value: f"{value:.2%}",
        ),
        (
            "Updates left out as not finite",
            summary.get("skipped_steps") or None,
            lambda value: f"{len(value)}: step{'s' if len(value) > 1 else ''} {', '.join(map(str, value))}",
        ),
    )
    shown = [(name, show(value)) for name, value, show in measured if value is not None]
    left_out = _left_out(summary)
    return [*shown, ("Images left out as unreadable", left_out)] if left_out else shown


def _failure(folder: RunFolder) -> dict[str, str] | None:
    """Why the last attempt ended, as a worker has said; None if none has."""
    said = folder.read(folder.error.name)
    if not isinstance(said.get("message"), str):
        return None
    code = said.get("exit_code")
    meaning = EXIT_CODES.get(code) if isinstance(code, int) else None
    return {"message": said["message"], "code": "" if meaning is None else f"Exit code {code}: {meaning}."}


def _nonfinite(summary: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """(step, what was not finite, the samples concerned) of the updates left out; none of a run that kept no more."""
    known = {why["step"]: why for why in summary.get("nonfinite_steps", ())}
    rows = []
    for step in summary.get("skipped_steps", ()) if known else ():
        if (why := known.get(step)) is None:
            rows.append((step, "not known", "not known"))
            continue
        more = why["num_samples"] - len(why["samples"])
        rest = f" and {more:,} more" if more else ""
        rows.append((step, why["kind"], ", ".join(map(str, why["samples"])) + rest))
    return rows


def _left_out(summary: Mapping[str, Any]) -> str | None:
    """How many of each split, or None if there were none."""
    counts = summary.get("skipped_images")
    if not isinstance(counts, Mapping) or not any(counts.values()):
        return None
    return f"{counts.get('train', 0):,} of training, {counts.get('eval', 0):,} of evaluation (left_out.json names them)"


def duration(seconds: float) -> str:
    """275 -> "4 min 35 s"; 12.3 -> "12.3 s"; 7260 -> "2 h 1 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: float) -> str:
    """Bytes as people say them, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} bytes"


def _tiles(
    summary: Mapping[str, Any], history: Sequence[Mapping[str, float]], found: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    tiles = []
    top1 = _last(summary, history, "val/top1")
    if top1 is not None:
        tiles.append({"name": "Top-1 accuracy", "value": f"{top1:.1%}", "note": "on held-out images"})
    if found is not None:
        scores = found["scores"]
        known, centre = scores["max_box_acc"], scores["centre_box_acc"]
        note = f"{100 * (known - centre):+.1f} points against the best centre box, {centre:.1%}"
        tiles.append({"name": "GT-known localization", "value": f"{known:.1%}", "note": note})
    if summary.get("wall_s") is not None:
        images = summary.get("images")
        note = f"{images:,} images" if isinstance(images, int) else "wall time"
        tiles.append({"name": "Training took", "value": duration(summary["wall_s"]), "note": note})
    rates = sorted(record["train/images_per_s"] for record in history if "train/images_per_s" in record)
    if rates:
        tiles.append(
            {"name": "Speed", "value": f"{rates[len(rates) // 2]:,.0f}", "note": "images/s, all workers, median"}
        )
    return tiles


def _about(config: Mapping[str, Any]) -> str:
    names = [_value(config, section, "name") for section in ("model", "data", "pretext", "objective")]
    if not names[0] or not names[1]:
        return ""
    task = f", pretext task {names[2]} ({names[3]})" if names[2] not in (None, "none") else ", no pretext task"
    if backbone := _value(config, "model", "backbone"):
        task = f", with the trunk of {backbone}"
    return f"{names[0]} on {names[1]}{task}"


def _origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, version = summary.get("model_name"), summary.get("model_version")
    rows = (
        ("Registered model", f"{model}, version {version}" if model and version else model),
        ("MLflow run", summary.get("run_id")),
        ("Data digest", summary.get("data_digest")),
    )
    return [(name, str(value)) for name, value in rows if value]


def _versions(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = summary.get("versions")
    return [(str(name), str(version)) for name, version in versions.items()] if isinstance(versions, dict) else []


def _confusion(path: Path) -> dict[str, Any] | None:
    content = _mapping(path)
    if not content:
        return None
    classes, matrix = [str(name) for name in content["classes"]], content["matrix"]
    wrong = [(count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count]
    worst = sorted(wrong, key=lambda pair: (-pair[0], pair[1:]))[:_NUM_PAIRS]
    return {
        "chart": figures.confusion_matrix(classes, matrix) if len(classes) <= _MOST_CLASSES else "",
        "pairs": [(classes[i], classes[j], count, sum(matrix[i])) for count, i, j in worst],
    }


def _commands(
    config: Mapping[str, Any], summary: Mapping[str, Any], run_folder: Path, found: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    commands = []
    model = summary.get("model_name")
    if model:
        uri = shlex.quote(f"models:/{model}@latest")
        other = "iou" if found is None or found["axis"] == "cam" else "cam"
        commands.append(
            ("Localize with the registered model, the other reading first", f"lorot wsol --model {uri} --axis {other}")
        )
        commands.append(("All registered models, with where they come from", "lorot models"))
    if config and config.get("job", "classify") == "classify" and _value(config, "pretext", "name") != "none":
        again = shlex.quote(str(run_folder / "config.yaml"))
        commands.append(
            (
                "The same job without the pretext task, to compare with",
                f"lorot train {again} name=baseline pretext.name=none objective.name=supervised",
            )
        )
    tracking = _value(config, "tracking", "uri") or store.default_uri()
    commands.append(("Every run in the browser", f"mlflow ui --backend-store-uri {shlex.quote(store.shown(tracking))}"))
    commands.append(("Every key that a configuration has", "lorot train --help"))
    return commands


def _num_pretext(config: Mapping[str, Any]) -> int:
    name = _value(config, "pretext", "name")
    if name not in pretext.available():
        return 0
    return pretext.load(name, **(_value(config, "pretext", "options") or {})).num_labels


def _last(summary: Mapping[str, Any], history: Sequence[Mapping[str, float]], name: str) -> float | None:
    final = (summary.get("metrics") or {}).get(name)
    recorded = [record[name] for record in history if name in record]
    value = final if isinstance(final, int | float) else recorded[-1] if recorded else None
    return None if value is None or not math.isfinite(value) else float(value)


def _value(config: Mapping[str, Any], section: str, key: str) -> Any:
    block = config.get(section)
    return block.get(key) if isinstance(block, dict) else None


def _nearest(values: Sequence[float], value: float) -> int:
    return min(range(len(values)), key=lambda index: abs(values[index] - value))


def _mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it to have a report without it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no mapping; remove it to have a report without it")
    return content


def _data_uri(path: Path) -> str | None:
    if not path.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
