"""What runs have measured while they trained, drawn as charts: of one run, or of several over one another."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from service.figures import Series, line_chart

History = Sequence[Mapping[str, float]]
_X = "optimizer step"
# (title, ((metric, what it is of), ...), whether values are shown in per cent).
_CURVES = (
    (
        "Loss",
        (("train/loss", "training, all"), ("train/class_loss", "classes"), ("val/class_loss", "held-out classes")),
        False,
    ),
    ("Top-1 accuracy", (("train/top1", "training"), ("val/top1", "held-out")), True),
    ("Pretext accuracy", (("train/pretext_accuracy", "training"),), True),
    ("Average precision", (("val/AP", "held-out AP"), ("val/AP50", "at IoU 0.5")), True),
    ("Learning rate", (("train/lr", "learning rate"),), False),
)
_SPEED = ("Speed", (("train/images_per_s", "images/s"),), False)


def of_run(history: History, num_pretext: int = 0, *, speed: bool = False) -> list[tuple[str, Markup]]:
    """(title, chart) of every curve that a run has recorded; chance is drawn beside the pretext accuracy.

    Args:
        num_pretext: classes of the pretext task; 0: none.
        speed: draw that as well.
    """
    charts = []
    for title, names, percent in (*_CURVES, *([_SPEED] if speed else [])):
        series = [Series(label, _points(history, name)) for name, label in names]
        if title.startswith("Pretext") and num_pretext and series[0].points:
            ends = [series[0].points[0][0], series[0].points[-1][0]]
            series.append(Series("chance", [(x, 1 / num_pretext) for x in ends], is_reference=True))
        if chart := line_chart(title, series, _X, percent=percent):
            charts.append((title, chart))
    return charts


def of_runs(runs: Sequence[tuple[str, History]]) -> list[tuple[str, Markup]]:
    """(title, chart) of every metric that one of these (name, history) has recorded, their curves over one another."""
    charts = []
    for title, names, percent in (*_CURVES, _SPEED):
        for name, label in names:
            # One that has recorded nothing keeps its colour and its dashes.
            series = [Series(run, _points(history, name), colour=k) for k, (run, history) in enumerate(runs)]
            about = title if len(names) == 1 else f"{title}, {label}"
            if chart := line_chart(about, series, _X, percent=percent):
                charts.append((about, chart))
    return charts


def _points(history: History, name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in history if name in record]


__all__ = ["History", "of_run", "of_runs"]
