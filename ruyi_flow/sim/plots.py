"""The plots of a run as SVG, in the colours of the page that shows them, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ruyi_flow.extras import is_installed
from ruyi_flow.sim.results import Result
from ruyi_flow.sim.scenario import Span

__all__ = ["bytes_text", "plots", "time_text"]

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Colours of the nodes, the entry node's first. The colour-blind can tell them apart (Okabe and Ito 2008)."""

_INK, _FAINT = "#0a0b0c", "#1a1b1c"
"""Placeholders that are replaced by the page's own colours, light or dark."""

_OPACITY = {"room": 0.6, "compute": 1.0, "queue": 0.6, "wire": 0.3}
_HATCH = {"room": "xxxx", "queue": "/////"}
"""Opacity and hatching of the parts of a request's time on a node (`PARTS`)."""

_BINS = 120
"""Most bins of a plot over time."""


def plots(result: Result) -> list[str]:
    """Return the plots as HTML, each with its title and legend; none if no request was answered.

    Without matplotlib, which is in the extra `sim`, it is a sentence that says so.
    """
    if result.metrics["failed"] == result.metrics["requests"]:
        return []
    if not is_installed("matplotlib"):
        return ["<p>This report has no plots: they need matplotlib, pip install 'ruyi-flow[sim]'.</p>"]
    import matplotlib

    colours = {node.name: _COLOURS[i % len(_COLOURS)] for i, node in enumerate(result.scenario.nodes)}
    looks = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ruyi-flow",
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.5,
        "hatch.linewidth": 0.5,
        "hatch.color": _INK,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), _INK
        ),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _FAINT),
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's own style
        matplotlib.rcParams.update(looks)
        return [_latency(result), _over_time(result, colours), _decided(result, colours), _requests(result, colours)]


def _latency(result: Result) -> str:
    """Plot the cumulative distributions of the latencies."""
    recorder = result.recorder
    latencies = {"time to first token": recorder.first, "time per output token": recorder.token}
    latencies["time of the whole answer"] = recorder.whole
    known = {name: distribution for name, distribution in latencies.items() if distribution.count}
    figure, panels = _figure(1, len(known), width=3.6 * len(known), height=2.9)
    for axis, (name, distribution) in zip(panels, known.items(), strict=True):
        points = distribution.points(200)
        if points[0][0] > 0 and points[-1][0] > 20 * points[0][0]:
            _log_time(axis, points[-1][0] / points[0][0])
        else:
            scale, unit = (1, "s") if points[-1][0] >= 10 else (1e3, "ms")
            axis.xaxis.set_major_formatter(lambda value, _, scale=scale: f"{scale * value:,.6g}")
            axis.set_xlabel(unit)
        axis.plot([v for v, _ in points], [s for _, s in points], color=_COLOURS[0], drawstyle="steps-post")
        marks = [(distribution.at(q), q) for q in (0.5, 0.95, 0.99)]
        axis.plot([v for v, _ in marks], [q for _, q in marks], "o", color=_COLOURS[5], markersize=4)
        axis.set_title(f"{name}\n" + ", ".join(f"p{100 * q:.0f} {time_text(v)}" for v, q in marks))
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panels[0].set_ylabel("share of requests")
    return _as_html("Latency", figure, {"p50, p95, p99": _chip(_COLOURS[5])})


def _log_time(axis: Any, span: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if span < 300 else (1.0,)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: time_text(value))


def _over_time(result: Result, colours: Mapping[str, str]) -> str:
    """Plot the activity of nodes, queues and links, and the throughput, over the run."""
    timeline, scenario = result.recorder.timeline, result.scenario
    counts = {node.name: node.machines for node in scenario.nodes}
    links = {f"{link.source}-{link.target}": link.target for link in scenario.links}
    rows: list[tuple[str, list[tuple[str, str, str, float]]]] = [
        ("busy, %\nof a tier", [(f"busy {n}", colour, "-", 100 / counts[n]) for n, colour in colours.items()]),
        ("tasks waiting", [(f"queue {n}", colour, "-", 1.0) for n, colour in colours.items()]),
        ("sessions waiting\nfor admission", [(f"room {n}", colour, "-", 1.0) for n, colour in colours.items()]),
        ("tokens\nper second", [("tokens", _INK, "-", 1.0)]),
        (
            "links,\nMbit/s",
            [
                (f"{way} {n}", colours[t], style, 8e-6)
                for n, t in links.items()
                for way, style in (("up", "-"), ("down", ":"))
            ],
        ),
    ]
    rows = [(label, known) for label, lines in rows if (known := [x for x in lines if x[0] in timeline.names])]
    figure, panels = _figure(len(rows), 1, width=10.8, height=0.5 + 1.45 * len(rows), sharex=True)
    series = {name: timeline.rate(name) for name in timeline.names}
    bins = max(map(len, series.values()))
    step = -(-bins // _BINS)
    unit_s, unit = next(
        (size, name)
        for size, name in ((3600, "h"), (60, "min"), (1, "s"))
        if bins * timeline.width_s > 5 * size or size == 1
    )
    edges = [timeline.width_s * step * i / unit_s for i in range(-(-bins // step) + 1)]
    for axis, (label, lines) in zip(panels, rows, strict=True):
        for name, colour, style, scale in lines:
            rates = _merged(series[name], step, scale)
            axis.stairs(rates, edges[: len(rates) + 1], color=colour, linestyle=style, linewidth=1.3)
        for span, colour in _outages(result, colours):
            axis.axvspan(
                span.at_s / unit_s, (span.at_s + span.for_s) / unit_s, color=colour, alpha=0.15, linewidth=0, zorder=0
            )
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, edges[-1])
    panels[-1].set_xlabel(f"{unit} of virtual time, in bins of {time_text(timeline.width_s * step)}")
    figure.align_ylabels()
    about = {n: _chip(colour) for n, colour in colours.items()}
    about |= {f"up, to {t}": _chip(colours[t], "line") for t in links.values()}
    if links:
        about["down"] = _chip("currentColor", "dots")
    if any(_outages(result, colours)):
        about["planned outage"] = _chip("currentColor", "wire")
    return _as_html("Over time", figure, about)


def _outages(result: Result, colours: Mapping[str, str]) -> list[tuple[Any, str]]:
    """Return the first hundred planned outages of the run, each with the colour of its node."""
    scenario, end = result.scenario, result.metrics["simulated_s"]
    spans: list[tuple[Span, str]] = [(span, colours[node.name]) for node in scenario.nodes for span in node.down]
    spans += [(span, colours[link.target]) for link in scenario.links for span in link.down]
    return [one for one in spans if one[0].at_s < end][:100]


def _merged(rates: Sequence[float], step: int, scale: float) -> list[float]:
    """Return scaled means of `step` values at a time."""
    return [scale * sum(rates[i : i + step]) / step for i in range(0, len(rates), step)]


def _decided(result: Result, colours: Mapping[str, str]) -> str:
    """Plot the share of tokens decided at each exit, and the bytes of each link."""
    scenario, metrics = result.scenario, result.metrics
    links = metrics["links"]
    figure, panels = _figure(1, 1 + bool(links), width=10.8 if links else 5.4, height=max(2.9, 0.7 + 0.36 * len(links)))
    exits = [(str(exit), colours[node.name]) for node in scenario.nodes for exit in node.exits]
    bars = panels[0].bar(
        [exit for exit, _ in exits],
        [100 * metrics["decided"][exit] for exit, _ in exits],
        color=[colour for _, colour in exits],
    )
    if len(exits) <= 10:  # more labels would overlap
        panels[0].bar_label(bars, fmt="{:.3g} %", fontsize=8)
    panels[0].grid(False, axis="x")
    panels[0].set(title="where tokens were decided", xlabel="exit", ylabel="% of tokens")
    about = {n: _chip(colour) for n, colour in colours.items()}
    if links:
        ways = [
            (
                f"{name}, {way}",
                links[name][f"bytes_{way}"],
                colours[scenario.nodes[i + 1].name],
                1.0 if way == "up" else 0.5,
            )
            for i, name in enumerate(links)
            for way in ("up", "down")
        ]
        for name, count, colour, alpha in reversed(ways):
            bar = panels[1].barh(name, count / 1e6, color=colour, alpha=alpha)
            panels[1].bar_label(bar, [bytes_text(count)], fontsize=8, padding=3)
        panels[1].grid(False, axis="y")
        panels[1].margins(x=0.2)
        panels[1].set(title="what links carried", xlabel="MB")
    return _as_html("Tokens and bytes", figure, about)


def _requests(result: Result, colours: Mapping[str, str]) -> str:
    """Plot some requests from arrival to end, and what their time was spent on."""
    recorder = result.recorder
    chosen = sorted(recorder.chosen, key=lambda one: one.number)
    slow = [one for one in recorder.slowest if one not in chosen]
    rows = [(f"#{one.number}", one) for one in chosen] + [(f"#{one.number}, slow", one) for one in slow]
    figure, (when, what) = _figure(
        1, 2, width=10.8, height=0.9 + 0.24 * (len(rows) + 1), sharey=True, width_ratios=(1, 2)
    )
    spent: Mapping[str, Mapping[str, float]] = result.metrics["spent_s"]
    mean = result.metrics["total_s"]["mean"]
    _split(what, -1, spent, colours, total_s=mean, about=f"{time_text(mean)}, the mean of all")
    for y, (_, one) in enumerate(rows):
        first, end = one.at_s + one.first_token_s, one.at_s + one.total_s
        when.plot([one.at_s, end], [y, y], color=_INK, linewidth=3, alpha=0.5, solid_capstyle="butt")
        when.plot([first], [y], "|", color=_INK, markersize=10, markeredgewidth=1.5)
        parts = {n: {part: times.get(n, 0.0) for part, times in one.parts.items()} for n in colours}
        tokens = "1 token" if one.new_tokens == 1 else f"{one.new_tokens:,} tokens"
        about = f"{time_text(one.total_s)}, {tokens}" + (f", {one.error}" if one.error else "")
        _split(what, y, parts, colours, total_s=one.total_s, about=about)
        what.plot([one.first_token_s], [y], "|", color=_INK, markersize=10, markeredgewidth=1.5)
    when.set_yticks(range(-1, len(rows)), ["mean", *(name for name, _ in rows)])
    when.set_ylim(len(rows) - 0.4, -1.6)
    for axis in (when, what):
        axis.grid(False, axis="y")
        axis.tick_params(axis="y", length=0)
    when.set(title="when", xlabel="s of virtual time")
    what.set(title="what the time was spent on, added up", xlabel="s since the arrival")
    what.set_xlim(0, 1.3 * what.dataLim.x1 or 1.0)
    about_all = {n: _chip(colour) for n, colour in colours.items()}
    about_all |= {"computing": _chip("currentColor"), "waiting for a step": _chip("currentColor", "queue")}
    about_all |= {"waiting for admission": _chip("currentColor", "room"), "anything else": _chip(_FAINT)}
    about_all |= {"network": _chip("currentColor", "wire")}
    return _as_html("Requests", figure, about_all | {"first token": _chip(_INK, "tick")})


def _split(
    ax: Any,
    y: int,
    spent: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
    *,
    total_s: float,
    about: str,
) -> None:
    """Draw a request's time as a bar, split by node and part; the rest of its time comes last."""
    left = 0.0
    for node, parts in spent.items():
        for part, seconds in parts.items():
            if seconds > 0:
                look = {"color": colours[node], "alpha": _OPACITY[part], "hatch": _HATCH.get(part)}
                ax.barh(y, seconds, 0.7, left, linewidth=0, **look)
                left += seconds
    ax.barh(y, max(0.0, total_s - left), 0.7, left, color=_FAINT, linewidth=0)
    ax.annotate(about, (max(left, total_s), y), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _figure(rows: int, columns: int, *, width: float, height: float, **layout: Any) -> tuple[Any, list[Any]]:
    """Return a figure with its size in inches, and its panels in order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if ratios := layout.pop("width_ratios", None):
        layout["gridspec_kw"] = {"width_ratios": ratios}
    return figure, [*figure.subplots(rows, columns, squeeze=False, **layout).flat]


def _chip(colour: str, like: str = "compute") -> str:
    """Return a sample of a colour for a legend."""
    return f'<i class={like} style="color:{_for_page(colour)}"></i>'


def _for_page(text: str) -> str:
    return text.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")


def _as_html(title: str, figure: Any, legend: Mapping[str, str]) -> str:
    """Return a figure as HTML, with its legend above it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Groups' ids repeat from plot to plot and nothing refers to them; HTML declares no XML name spaces.
    svg = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", re.sub(r'<g id="[^"]*"', "<g", svg))
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{title}"', svg)
    chips = "".join(f"<span>{chip}{escape(name)}</span>" for name, chip in legend.items())
    width = f"{figure.get_figwidth() / 10.8:.0%}"
    return (
        f'<h2>{title}</h2><figure style="max-width:{width}"><figcaption>{chips}</figcaption>{_for_page(svg)}</figure>'
    )


def time_text(seconds: float) -> str:
    """Return a time in a readable unit."""
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 600:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def bytes_text(count: float) -> str:
    """Return a number of bytes in a readable unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"
