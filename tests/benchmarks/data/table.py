"""From measurements to the table, the bars and the sentence about the machine."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A measurement: images_per_s, images_per_cpu_s, first_batch_s, pss_bytes, rss_bytes.
Round = Mapping[str, float]
Rounds = Mapping[str, Sequence[Round | None]]


@dataclass(frozen=True)
class Row:
    """What the table needs to know of a loader, besides its rounds: its bytes on disk and an image; what differs."""

    title: str
    disk_bytes: float
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Bar:
    """`row` is held to `least` times `other`, in images per CPU-second (in memory: `most` times)."""

    text: str
    row: str
    other: str
    least: float | None = None
    most: float | None = None
    key: str = "images_per_cpu_s"


BARS = (
    Bar("class folders, against torchvision", "ours", "torchvision", least=3.2),
    Bar("class folders, against FFCV half raw of the same size", "ours", "ffcv_half", least=1.5),
    Bar("prepared, against torchvision on class folders", "ours_256", "torchvision", least=5.0),
    Bar("prepared, against FFCV on the same images as jpeg", "ours_256", "ffcv_jpeg256", least=1.6),
    Bar("prepared, against FFCV raw", "ours_256", "ffcv_raw256", least=1.2),
    Bar("class folders, against the same job in plain C", "ours", "limit_plain", least=0.9),
    Bar("LoRot-E, against none", "ours_lorot_e", "ours", least=0.97),
    Bar("LoRot-I, against none", "ours_lorot_i", "ours", least=0.97),
    Bar("memory (PSS), against torchvision with two workers", "ours", "torchvision", most=1.0, key="pss_bytes"),
)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio(rounds: Rounds, row: str, other: str, key: str) -> Spread | None:
    """The ratios of two rows within each round that has both; None if there is no such round."""
    pairs = zip(rounds.get(row, ()), rounds.get(other, ()), strict=False)
    values = [mine[key] / theirs[key] for mine, theirs in pairs if mine and theirs]
    return Spread.of(values) if values else None


def markdown(rows: Mapping[str, Row], rounds: Rounds, base: str = "torchvision") -> str:
    """The table, slowest first: medians over the rounds; ratios are medians of paired ratios, with quartiles."""
    lines = [
        "| loader | images/s | images/CPU-s | against torchvision, per CPU-s | the same, per s | first batch, s "
        "| memory (PSS), MB | RSS, MB | disk, kB an image |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {name: [one for one in rounds.get(name, ()) if one] for name in rows}
    there = [name for name in rows if found[name]]
    for name in sorted(there, key=lambda name: _median(found[name], "images_per_cpu_s")):
        row, measured = rows[name], found[name]
        cells = [
            row.title + (" (*)" if row.problems else ""),
            f"{_median(measured, 'images_per_s'):,.0f}",
            f"{_median(measured, 'images_per_cpu_s'):,.0f}",
            _shown(ratio(rounds, name, base, "images_per_cpu_s")),
            _shown(ratio(rounds, name, base, "images_per_s")),
            f"{_median(measured, 'first_batch_s'):.1f}",
            f"{_median(measured, 'pss_bytes') / 1e6:,.0f}",
            f"{_median(measured, 'rss_bytes') / 1e6:,.0f}",
            f"{row.disk_bytes / 1e3:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"(*) {row.title}: not the same work: {'; '.join(row.problems)}" for row in rows.values() if row.problems]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def bars(rounds: Rounds) -> tuple[str, bool]:
    """What was asked for and what came out, and whether nothing that could be measured fell short."""
    lines, met = ["| bar | asked | median | quartiles | |", "|---|---:|---:|---:|---|"], True
    for bar in BARS:
        asked = f">= {bar.least:g}" if bar.least is not None else f"<= {bar.most:g}"
        found = ratio(rounds, bar.row, bar.other, bar.key)
        if found is None:
            lines.append(f"| {bar.text} | {asked} | | | not measured |")
            continue
        holds = found.middle >= bar.least if bar.least is not None else found.middle <= (bar.most or 0)
        met &= holds
        spread = f"{found.low:.2f} to {found.high:.2f}"
        lines.append(f"| {bar.text} | {asked} | {found.middle:.2f} | {spread} | {'met' if holds else 'MISSED'} |")
    return "\n".join(lines), met


def _median(measured: Sequence[Round], key: str) -> float:
    return statistics.median(one[key] for one in measured)


def _shown(found: Spread | None) -> str:
    return "" if found is None else f"{found.middle:.2f} [{found.low:.2f}, {found.high:.2f}]"


def describe(results: Mapping[str, Any]) -> str:
    """The whole answer, from what was written to the results' file."""
    rows = {name: Row(**facts) for name, facts in results["rows"].items()}
    parts = [
        f"{results['corpus']} corpus: {results['files']:,} JPEGs of 500x375, {results['file_bytes'] / 1e3:.1f} kB on "
        f"average; RandomResizedCrop 224, flip, normalise to float32; batches of {results['batch']}; "
        f"{results['images']:,} images a round after {results['warm_up']:,}; {results['rounds_wanted']} interleaved "
        "rounds",
        f"Machine: {results['machine']}",
        markdown(rows, results["rounds"]),
    ]
    if results["left_out"]:
        parts.append("\n".join(f"- not run: {title}: {why}" for title, why in results["left_out"].items()))
    if results["corpus"] == "light":
        parts.append(bars(results["rounds"])[0])
    else:
        parts.append("The bars are for the light corpus.")
    return "\n\n".join(parts)
