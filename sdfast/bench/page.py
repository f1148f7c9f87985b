"""A record as one HTML page that needs no network and no script, for screens, phones and paper."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from sdfast.bench import plots, tables
from sdfast.bench.breakdown_kinds import KINDS
from sdfast.bench.plots import Line, Point
from sdfast.bench.record import Record, Row, of_part
from sdfast.bench.request import OPS
from sdfast.bench.tables import PART_TITLES, TITLES, milliseconds

_STYLE = Path(__file__).with_name("page.css")


def html(result: Record) -> str:
    """The whole page."""
    sections = [
        *_speed(result), *_roofline(result), *_breakdown(result), *_error(result), *_images(result),
        *_tables(result), *_environment(result),
    ]  # fmt: skip
    machine = result["environment"]
    what = machine["gpu"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['threads']} threads"
    notes = []
    if result["quick"]:
        notes.append("A quick run: few cases, small models. Sizes of Stable Diffusion come without --quick.")
    load, cores = machine.get("load_average"), machine.get("cores") or 1
    if load is not None and load >= 0.5 * cores:
        notes.append(f"The machine was busy when this began (load {load:.1f}): the times will not repeat.")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            "<title>sdfast beside other engines</title>",
            f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
            "<header><h1>sdfast beside other engines</h1>",
            f"<p>{escape(str(what))}; torch {escape(str(machine['torch']))}; commit"
            f" {escape(str(machine['commit']))}; {escape(str(machine['date'])[:10])}</p>",
            *(f'<p class="note">{escape(note)}</p>' for note in notes),
            "</header>",
            *sections,
            "</main></body></html>",
            "",
        ]
    )


def _section(title: str, text: str, *body: str) -> Iterator[str]:
    yield f"<section><h2>{escape(title)}</h2><p>{text}</p>"
    yield from body
    yield "</section>"


def _measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "sides" in row]


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<li>{mark}{escape(text)}</li>" for mark, text in entries)
    return f'<ul class="legend">{items}</ul>'


def _speed(result: Record) -> Iterator[str]:
    """Bars: a summary of each operation, then every row with every engine."""
    rows = _measured(result["rows"])
    if not rows:
        return
    ratios = [ratio["ratio"] for row in rows for ratio in row["ratios"].values()]
    bounds = min(0.6, *ratios) / 1.3, max(2.0, *ratios) * 1.3

    def bar(label: str, ratio: dict[str, float], what: str) -> str:
        title = f"{label}: {what} {tables.interval(ratio)}"
        drawn = plots.ratio_bar(ratio["ratio"], ratio["low"], ratio["high"], bounds, title)
        return (
            f'<div class="row"><span class="label">{escape(label)}</span>{drawn}'
            f'<span class="value">{ratio["ratio"]:.2f}x</span></div>'
        )

    body = []
    summary = list(_by_operation(rows))
    if len(summary) > 1:
        bars = "".join(bar(label, ratio, "median, slowest to fastest case") for label, ratio in summary)
        body.append(
            "<h3>Operations, the median of their cases beside eager</h3><p>The line runs from the slowest"
            f' case to the fastest.</p><div class="bars">{bars}{plots.scale(bounds)}</div>'
        )
    for part, title in PART_TITLES.items():
        shown = of_part(rows, part)
        bars = "".join(
            bar(f"{row['name']}, {row['dtype']}", ratio, f"beside {TITLES.get(engine, engine)}")
            if engine == "eager"
            else bar(f"… beside {TITLES.get(engine, engine)}", ratio, row["name"])
            for row in shown
            for engine, ratio in row["ratios"].items()
        )
        if shown:
            body.append(
                f'<h3>{title}, each beside eager</h3><div class="bars">{bars}{plots.scale(bounds)}</div>'
            )
    text = (
        "How many times as long the other takes: above 1 (to the right) sdfast is faster. The line in a bar"
        " is the 95% interval. The scale is logarithmic."
    )
    yield from _section("Speed", text, *body)


def _by_operation(rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, float]]]:
    for op in OPS:
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            found = [r["ratios"]["eager"]["ratio"] for r in rows if (r.get("op"), r["dtype"]) == (op, dtype)]
            if found:
                middle = statistics.median(found)
                yield f"{op}, {dtype}, {len(found)}", {"ratio": middle, "low": min(found), "high": max(found)}


def _roofline(result: Record) -> Iterator[str]:
    """A plot for each dtype: what each case reaches, under what the machine can."""
    rows = [row for row in _measured(result["rows"]) if "flops" in row]
    if not rows:
        return
    copy = result["limits"]["copy_gb_per_s"]
    body = []
    for dtype, peak in result["limits"]["peak_gflop_per_s"].items():
        shown = [row for row in rows if row["dtype"] == dtype]
        points = [
            Point(
                row["flops"] / row["bytes"], row["flops"] / row["sides"][side]["ms"] / 1e6,
                OPS.index(row["op"]),
                f"{row['name']}, {TITLES[side]}: {row['flops'] / row['sides'][side]['ms'] / 1e6:.1f} GFLOP/s",
                hollow=side == "eager",
            )
            for side in ("eager", "sdfast")
            for row in shown
        ]  # fmt: skip
        corners = [(1e-3, 1e-3 * copy), (peak / copy, peak), (1e6, peak)]
        lines = [Line(corners, f"peak {peak:.0f} GFLOP/s, copy {copy:.0f} GB/s")]
        drawn = plots.scatter(
            points, lines, x_label="operations a byte that must be moved", y_label="GFLOP/s",
            label=f"Roofline, {dtype}: rate over arithmetic intensity of {len(shown)} cases",
        )  # fmt: skip
        body.append(f"<h3>{dtype}</h3><figure>{drawn}</figure>")
    ops = [op for op in OPS if any(row["op"] == op for row in rows)]
    entries = [(plots.legend_mark(OPS.index(op)), op) for op in ops]
    entries += [
        (plots.legend_mark(0), "filled: sdfast"),
        (plots.legend_mark(0, hollow=True), "hollow: eager"),
    ]
    text = (
        "Rates over arithmetic intensity; the line is what this machine was measured to reach. Convolutions"
        " count the direct algorithm's operations, of which Winograd's does fewer, and small tensors stay in"
        " caches faster than memory: both may lie above the line."
    )
    yield from _section("Roofline", text, _legend(entries), *body)


def _breakdown(result: Record) -> Iterator[str]:
    rows = [row for row in result["breakdown"] if "operations" in row]
    if not rows:
        return
    kinds = [*KINDS, "other", "outside"]
    body = [
        _legend((plots.legend_mark(i), name) for i, name in enumerate(kinds)),
    ]
    for row in rows:
        total = max(row["step_ms"], row["eager"]["step_ms"])
        bars = []
        for name, side in (("eager", row["eager"]), ("sdfast", row)):
            times = {
                kind: sum(op["ms"] for op in side["operations"] if op["kind"] == kind) for kind in kinds
            }  # fmt: skip
            segments = [
                (max(0.0, ms), kinds.index(kind), f"{kind}: {milliseconds(ms)} ms")
                for kind, ms in times.items()
            ]
            label = f"{name}: " + ", ".join(title for _, _, title in segments)
            bars.append(
                f'<div class="row"><span class="label">{name}</span>'
                f"{plots.stacked_bar(segments, total, label)}"
                f'<span class="value">{milliseconds(side["step_ms"])} ms</span></div>'
            )
        cells = "".join(
            f"<tr><td><code>{escape(op['operation'])}</code></td><td>{op['calls'] or ''}</td>"
            f"<td>{milliseconds(op['ms'])}</td><td>{op['share']:.1%}</td>"
            f"<td>{format(op['of_peak'], '.0%') if 'of_peak' in op else ''}</td></tr>"
            for op in row["operations"]
        )
        body.append(
            f"<h3>{escape(row['name'])}, {row['dtype']}</h3>"
            f'<div class="bars">{"".join(bars)}</div><div class="scroll"><table><thead><tr>'
            "<th>operation in sdfast</th><th>calls</th><th>ms</th><th>share</th><th>of peak</th></tr></thead>"
            f"<tbody>{cells}</tbody></table></div>"
        )
    text = "One call after the first, by torch's profiler; both bars have one scale."
    yield from _section("Where a step's time goes", text, *body)


def _error(result: Record) -> Iterator[str]:
    """Each side of each row: how far off, and how fast."""
    rows = [row for row in _measured(result["rows"]) if row["part"] != "images"]
    parts = [part for part in PART_TITLES if any(row["part"] == part for row in rows)]
    points = [
        Point(
            row["sides"]["eager"]["ms"] / side["ms"], side["error"], parts.index(row["part"]),
            f"{row['name']}, {row['dtype']}, {TITLES.get(name, name)}: error {side['error']:.1e},"
            f" {row['sides']['eager']['ms'] / side['ms']:.2f}x eager's speed",
            hollow=name != "sdfast",
        )
        for row in rows
        for name, side in row["sides"].items()
    ]  # fmt: skip
    if not points:
        return
    drawn = plots.scatter(
        points, x_label="times eager's speed", y_label="relative error", floor=1e-9,
        label="Relative error over speed beside eager, of every case",
    )  # fmt: skip
    entries = [(plots.legend_mark(i), PART_TITLES[part].lower()) for i, part in enumerate(parts)]
    entries += [
        (plots.legend_mark(0), "filled: sdfast"),
        (plots.legend_mark(0, hollow=True), "hollow: others"),
    ]
    text = (
        "To the right is faster, below is closer: operations to fp64, models and gradients to eager in fp32,"
        " which itself is drawn at 1e-9. Half-precision types lie where their rounding is."
    )
    yield from _section("Error and speed", text, _legend(entries), f"<figure>{drawn}</figure>")


def _images(result: Record) -> Iterator[str]:
    rows = [row for row in result["rows"] if "pictures" in row]
    body = []
    for row in rows:
        figures = []
        for name, url in row["pictures"].items():
            caption = TITLES.get(name, name)
            if name == "difference":
                caption += (
                    f", {row['difference_gain']} times as bright; largest {row['largest_difference']} of 255,"
                    f" mean {row['mean_difference']:.3f}"
                )
            else:
                side = row["sides"][name]
                caption += (
                    f", {milliseconds(side['ms'])} ms; first image after"
                    f" {milliseconds(side['first_image_ms'])} ms, loading included, imports not"
                )
            figures.append(
                f'<figure><img src="{url}" alt="{escape(row["name"])}: {escape(name)}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
        body.append(
            f'<h3>{escape(row["name"])}, {row["dtype"]}</h3><div class="pictures">{"".join(figures)}</div>'
        )
    text = (
        "From the same seeds. The digits are drawn by the small pipeline that ships with sdfast. The"
        " photograph (Eileen Collins, NASA, from scikit-image) passes that pipeline's VAE, which knows"
        " nothing but digits of 32x32 pixels: that it comes out coarse is the model's doing, that both sides"
        " agree is what is shown."
    )
    if rows:
        yield from _section("Images", text, *body)


def _tables(result: Record) -> Iterator[str]:
    head = "".join(f"<th>{escape(name)}</th>" for name in tables.SIDE_COLUMNS)
    body = []
    for part, title in PART_TITLES.items():
        if rows := _measured(of_part(result["rows"], part)):
            cells = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
                for row in tables.side_rows(rows)
            )
            body.append(
                f'<h3>{title}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{cells}</tbody></table></div>"
            )
    if notes := tables.absent(result):
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body.append(f"<h3>Not measured</h3><ul>{items}</ul>")
    text = (
        "Medians of warm calls. The first call includes compilation and conversion of a model; memory is the"
        " peak of the engine's process from having the weights on, Python and torch included."
    )
    if body:
        yield from _section("Every number", text, *body)


def _environment(result: Record) -> Iterator[str]:
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in tables.environment_rows(result)
    )
    yield from _section(
        "Machine", "What the numbers depend on.", f'<table class="machine"><tbody>{cells}</tbody></table>'
    )
