"""Charts as inline SVG: no scripts, no fonts, colours from the page's style sheet, so they follow light and dark.

The page defines the classes `s0`, `s1`, ... (colours of series, used as `currentColor`) and `axis`, `grid`, `label`.
Curves differ in their dashes, too: they are told apart without colours, and in print.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 30, 34
# More points than this make a chart heavier and not finer.
_MOST_POINTS = 300
# Beyond it differences are not finite any more, and below its inverse they are none.
_LARGEST = 1e100
# Lengths of dashes and gaps by colour; the first is solid. Each is to be seen whole in a legend's swatch.
_DASHES = ("", "8 4", "2 3", "10 3 2 3", "10 3 2 3 2 3", "14 3 6 3")
_SWATCH = 26


@dataclass(frozen=True)
class Series:
    """One curve: (x, y) points by rising x; points that are not finite are left out.

    Attributes:
        is_reference: it was not measured, and does not end in a dot.
        colour: which of the page's, and which dashes; None: those of its place among the curves that are drawn.
    """

    name: str
    points: Sequence[tuple[float, float]]
    is_reference: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Strip:
    """A row of independent values with their mean and spread; `reference` is somebody else's number, or None."""

    name: str
    values: Sequence[float]
    mean: float
    deviation: float | None = None
    reference: float | None = None


def line_chart(title: str, series: Sequence[Series], x_label: str, *, percent: bool = False) -> Markup:
    """A chart of curves with a legend, readable at 320 CSS pixels; empty if there is no curve with a point.

    Args:
        title: says what is on the y axis.
        percent: y values are fractions, shown in per cent.
    """
    drawn = [replace(one, points=_thin(one.points)) for one in series]
    lost = {one.name for one in series if one.points and not _is_drawn(one.points[-1])}
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return Markup("")
    xs, ys = zip(*(point for one in drawn for point in one.points), strict=True)
    x_ticks = ticks(min(xs), max(xs), 5)
    y_ticks = ticks(min(0.0, *ys), max(ys), 4)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low or 1) * (_HEIGHT - _TOP - _BOTTOM),
        )

    right, base = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(_element("line", class_="grid", x1=_LEFT, x2=right, y1=y, y2=y))
        parts.append(_text(f"{100 * tick:g}%" if percent else short(tick), _LEFT - 6, y + 4, "end"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(_text(short(tick), place(tick, y_low)[0], base + 16, "middle"))
    parts.append(_element("line", class_="axis", x1=_LEFT, x2=right, y1=base, y2=base))
    parts.append(_text(x_label, right, _HEIGHT - 3, "end"))
    parts.append(_legend(drawn))
    summary = []
    for number, one in enumerate(drawn):
        placed = [place(*point) for point in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        look = _colour(one, number)
        parts.append(_element("polyline", class_=f"s{look} curve", points=path, **_dashes(look)))
        if not one.is_reference:
            parts.append(_element("circle", class_=f"s{look} dot", cx=placed[-1][0], cy=placed[-1][1], r=3))
        last = one.points[-1][1]
        summary.append(f"{one.name} ends at {f'{last:.1%}' if percent else short(last)}")
        if one.name in lost:
            # Beside the last point, on the sides where there is room: the legend is above.
            x, y = placed[-1]
            beside = "start" if x < _WIDTH / 2 else "end"
            parts.append(_text("then not finite", x, y + 18 if y < _HEIGHT / 2 else y - 8, beside))
            summary[-1] += ", then it is not finite"
    return _svg(_WIDTH, _HEIGHT, f"{title}: {', '.join(summary)}", parts)


def swatch(colour: int) -> Markup:
    """A piece of the curve of this colour, as legends have it, to stand in a text."""
    line = _element("line", class_="curve", x1=0, x2=_SWATCH, y1=2, y2=2, **_dashes(colour))
    box = f"0 0 {_SWATCH} 4"
    return _element("svg", line, class_=f"key s{colour}", viewBox=box, width=_SWATCH, height=4, aria_hidden="true")


def strip_chart(title: str, strips: Sequence[Strip], reference: str = "") -> Markup:
    """A row for each strip: its values as dots, the mean as a line with a bar of one deviation to both sides.

    Args:
        title: says what the values are; they are fractions, shown in per cent.
        reference: what the diamonds are that mark the strips' references.

    Returns:
        The chart; empty without a strip.
    """
    if not strips:
        return Markup("")
    left, pitch, top = 16 + 6.6 * max(len(_cut(one.name)) for one in strips), 34, 34
    reach = [value for one in strips for value in (*one.values, one.mean)]
    reach += [one.mean + sign * one.deviation for one in strips if one.deviation is not None for sign in (-1, 1)]
    reach += [one.reference for one in strips if one.reference is not None]
    marks = [mark / 100 for mark in ticks(100 * min(reach), 100 * max(reach), 5)]
    low, high = marks[0], marks[-1]
    base = top + pitch * len(strips)

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT)

    parts = []
    for mark in marks:
        x = across(mark)
        parts.append(_element("line", class_="grid", x1=x, x2=x, y1=top - 8, y2=base))
        parts.append(_text(f"{round(100 * mark, 6):g}%", x, base + 16, "middle"))
    summary = []
    for number, one in enumerate(strips):
        y = top + pitch * (number + 0.5) - 4
        parts.append(_text(_cut(one.name), left - 8, y + 4, "end"))
        inside = []
        if one.deviation is not None:
            ends = across(one.mean - one.deviation), across(one.mean + one.deviation)
            inside.append(_element("line", class_="curve", x1=ends[0], x2=ends[1], y1=y, y2=y))
        x = across(one.mean)
        inside.append(_element("line", class_="curve", x1=x, x2=x, y1=y - 9, y2=y + 9))
        inside += [_element("circle", class_="dot", cx=across(value), cy=y, r=3.5) for value in one.values]
        parts.append(_element("g", Markup("").join(inside), class_=f"s{number}"))
        if one.reference is not None:
            place = across(one.reference)
            corners = ((place, y - 7), (place + 7, y), (place, y + 7), (place - 7, y))
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in corners)
            parts.append(_element("polygon", class_="reference", points=path))
        summary.append(f"{one.name} {one.mean:.1%}")
    parts.append(_element("line", class_="axis", x1=left, x2=_WIDTH - _RIGHT, y1=base, y2=base))
    parts.append(
        _text(
            f"dots: single values; line: mean ± deviation{f'; diamond: {reference}' if reference else ''}",
            4,
            14,
            "start",
        )
    )
    return _svg(_WIDTH, base + 28, f"{title}: {', '.join(summary)}", parts)


def alone(chart: Markup, style: str) -> str:
    """A chart as a file of its own, with the rules for its classes that a page would give."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    text = str(chart).replace("<svg", head, 1)
    cut = text.index(">") + 1
    return f"{text[:cut]}<style>{style}</style>{text[cut:]}\n"


def confusion_matrix(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> Markup:
    """A matrix (rows: true classes, columns: predicted) shaded by the share of its row, with the counts in it."""
    K = len(classes)
    longest = max((len(_cut(name)) for name in classes), default=0)
    cell, margin = 34, round(16 + 7.2 * longest)
    parts = []
    for row, counts in enumerate(matrix):
        whole = sum(counts) or 1
        y = margin + row * cell
        parts.append(_text(_cut(classes[row]), margin - 6, y + cell / 2 + 4, "end"))
        for column, count in enumerate(counts):
            x = margin + column * cell
            # By the root, because a few mistakes among hundreds should still be seen.
            opacity = 0.12 + 0.88 * math.sqrt(count / whole) if count else 0.0
            square = {"x": x, "y": y, "width": cell - 2, "height": cell - 2}
            inside = [
                _element("title", f"{classes[row]} taken for {classes[column]}: {count} of {whole}"),
                _element("rect", class_="cell", **square),
                _element("rect", class_="right" if row == column else "wrong", fill_opacity=opacity, **square),
            ]
            if count:
                tone = "on-dark" if opacity > 0.6 else "on-light"
                inside.append(_text(str(count), x + cell / 2 - 1, y + cell / 2 + 3, "middle", class_=f"count {tone}"))
            parts.append(_element("g", Markup("").join(inside)))
    for column, name in enumerate(classes):
        turned = f"translate({margin + (column + 0.5) * cell + 3:.0f} {margin - 6}) rotate(-90)"
        parts.append(_element("text", _cut(name), class_="label", transform=turned))
    right, whole = sum(matrix[k][k] for k in range(K)), sum(map(sum, matrix))
    return _svg(margin + K * cell, margin + K * cell, f"Confusion matrix: {right} of {whole} right", parts)


def boxed_picture(
    source: str, size: int, true_boxes: Sequence[Sequence[float]], found_box: Sequence[float], about: str
) -> Markup:
    """A picture (`source`: a data URI, `size` pixels square) with true boxes and a found one, sharp at any scale."""
    parts = [_element("image", href=source, width=size, height=size)]
    for boxes, kind in ((true_boxes, "true"), ([found_box], "found")):
        for x_min, y_min, x_max, y_max in boxes:
            shape = {"x": x_min, "y": y_min, "width": x_max - x_min, "height": y_max - y_min}
            if min(shape["width"], shape["height"]) > 0:
                parts += [_element("rect", class_=f"box {layer}", **shape) for layer in ("halo", kind)]
    return _svg(size, size, about, parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that span low .. high, roughly `about` of them."""
    if not high - low > 1 / _LARGEST:
        high = low + (abs(low) if abs(low) > 1 / _LARGEST else 1.0)
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step * about >= (high - low) * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in at most three digits: 12000 -> 12k, 0.00125 -> 0.00125."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _legend(series: Sequence[Series]) -> Markup:
    parts, x = [], float(_LEFT)
    for number, one in enumerate(series):
        look = _colour(one, number)
        parts.append(_element("line", class_=f"s{look} curve", x1=x, x2=x + _SWATCH, y1=12, y2=12, **_dashes(look)))
        parts.append(_text(one.name, x + _SWATCH + 5, 16, "start"))
        x += _SWATCH + 15 + 6.4 * len(one.name)
    return Markup("").join(parts)


def _colour(series: Series, number: int) -> int:
    return number if series.colour is None else series.colour


def _dashes(colour: int) -> dict[str, str]:
    dashes = _DASHES[colour % len(_DASHES)]
    return {"stroke_dasharray": dashes} if dashes else {}


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    kept = [(float(x), float(y)) for x, y in points if _is_drawn((x, y))]
    stride = -(-len(kept) // _MOST_POINTS)
    return kept if stride <= 1 else [*kept[:-1:stride], kept[-1]]


def _is_drawn(point: tuple[float, float]) -> bool:
    """Whether both are finite, and so are differences of such."""
    return all(abs(value) < _LARGEST for value in point)


def _cut(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _svg(width: int, height: int, about: str, parts: Sequence[Markup]) -> Markup:
    content = Markup("").join([_element("title", about), *parts])
    return _element("svg", content, viewBox=f"0 0 {width} {height}", role="img", aria_label=about)


def _text(text: str, x: float, y: float, anchor: str, class_: str = "label") -> Markup:
    return _element("text", text, class_=class_, x=x, y=y, text_anchor=anchor)


def _element(tag: str, content: str = "", /, **attributes: str | float) -> Markup:
    """An element; content and values are escaped. `class_` is class, other underscores are hyphens."""
    written = [
        Markup(' {}="{}"').format(
            name.removesuffix("_").replace("_", "-"), f"{round(value, 2):g}" if isinstance(value, float) else value
        )
        for name, value in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup("").join(written), content)


__all__ = [
    *("Series", "Strip", "alone", "boxed_picture", "confusion_matrix", "line_chart", "short", "strip_chart", "swatch"),
    "ticks",
]
