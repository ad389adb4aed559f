"""A run's report.html: statistics, plots and the scenario in one file that loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ruyi_flow.sim.plots import bytes_text, plots, time_text
from ruyi_flow.sim.results import Result

__all__ = ["bottleneck", "counts_text", "dollars", "write_report"]

_BOTTLENECK = 0.8
"""Share of the time from which a busy node or link is called the bottleneck."""

_MOST_TEXT = 100_000
"""Most characters of the scenario that are shown."""


def write_report(folder: Path, result: Result) -> None:
    """Write report.html. The same result gives the same file."""
    metrics, scenario = result.metrics, result.scenario
    text = scenario.text()
    if len(text) > _MOST_TEXT:
        text = text[:_MOST_TEXT] + "\n… the rest is in scenario.yaml\n"
    failures = ", ".join(f"{count:,} {name}" for name, count in metrics["errors"].items())
    parts = [
        f"<h1>{escape(result.name)}</h1>",
        f"<p>{escape(scenario.family)} over {escape(' → '.join(f'{n.machines:,} {n.name}' for n in scenario.nodes))}, "
        f"{scenario.policy.routing().mode} mode, {scenario.workload.arrivals.kind} arrivals; "
        f"{time_text(metrics['simulated_s'])} of virtual time, seed {metrics['seed']}</p>",
        f"<p class=finding>{escape(bottleneck(metrics))}</p>",
        failures and f"<p class=bad>{metrics['failed']:,} of {metrics['requests']:,} requests failed: {failures}</p>",
        _cards(metrics),
        *plots(result),
        *_tables(result),
        f"<details><summary>The scenario, resolved</summary><pre>{escape(text)}</pre></details>",
    ]
    head, tail = _PAGE.split("BODY")
    head = head.replace("TITLE", escape(result.name))
    (folder / "report.html").write_text("\n".join([head, *filter(None, parts), tail]), encoding="utf-8")


def bottleneck(metrics: Mapping[str, Any]) -> str:
    """Return a sentence on where the mean request spends its time, and which node or link is busiest."""
    if metrics["failed"] == metrics["requests"]:
        return "No request was answered, so it is not known where their time goes."
    spent: dict[str, dict[str, float]] = metrics["spent_s"]
    total = max(metrics["total_s"]["mean"], sum(sum(parts.values()) for parts in spent.values()))
    if not total:
        return "Requests took no time at all."
    of_mean = f"of the mean request's {time_text(metrics['total_s']['mean'])}"
    places = [
        (node["utilisation"], name, spent[name]["compute"] + spent[name]["queue"] + spent[name]["room"])
        for name, node in metrics["nodes"].items()
    ]
    for (name, link), target in zip(metrics["links"].items(), [*spent][1:], strict=True):
        places.append((link["utilisation"], f"the link {name}", spent[target]["wire"]))
    busy, fullest, seconds = max(places, key=lambda place: place[0])
    if busy >= _BOTTLENECK:
        return (
            f"The bottleneck is {fullest}, busy {busy:.0%} of the time; "
            f"its work and waiting for it take {seconds / total:.0%} {of_mean}."
        )
    words = {
        "room": "waiting for admission to {} (its limits)",
        "compute": "computing on {}",
        "queue": "waiting for a step of {}",
        "wire": "the network to {} and back",
    }
    ways = [(s, words[kind].format(node)) for node, parts in spent.items() for kind, s in parts.items()]
    most, where = max(ways, key=lambda way: way[0])
    return (
        f"The largest part {of_mean} is {where}, {most / total:.0%}; "
        f"no node or link is a bottleneck, the busiest is {fullest}, {busy:.1%} of the time."
    )


def dollars(value: float, digits: int = 4) -> str:
    """Return an amount of money; without a price nothing is known of it, which is not the same as free."""
    return f"${value:.{digits}g}" if value else "not priced"


def _cards(metrics: Mapping[str, Any]) -> str:
    first, token = metrics["first_token_s"], metrics["token_s"]
    cards = [
        ("requests", f"{metrics['requests']:,}", f"{metrics['failed']:,} failed"),
        ("tokens per second", f"{metrics['tokens_per_s']:,.1f}", f"{metrics['tokens']:,} in all"),
        ("time to first token, p50", time_text(first["p50"]), f"p95 {time_text(first['p95'])}"),
        ("time per output token, p50", time_text(token["p50"]), f"p95 {time_text(token['p95'])}"),
        (
            "agreement with the last exit",
            f"{metrics['agreement']:.1%}",
            f"{metrics['escalations_per_token']:.2f} escalations per token",
        ),
        (
            "prompt tokens reused",
            f"{metrics['reused_tokens'] / max(1, metrics['prompt_tokens']):.0%}",
            f"of {metrics['prompt_tokens']:,}, from parked sessions",
        ),
        (
            "bytes up per token",
            bytes_text(metrics["bytes_up_per_token"]),
            f"down {bytes_text(metrics['bytes_down_per_token'])}",
        ),
        ("energy per token", f"{metrics['joules_per_token']:.3g} J", f"{metrics['energy_j']:,.0f} J in all"),
        (
            "cost per million tokens",
            dollars(metrics["usd_per_million_tokens"], 3),
            f"{dollars(metrics['cost_usd'], 3)} in all" if metrics["cost_usd"] else "no price in the scenario",
        ),
    ]
    inner = "".join(f"<div>{name}<b>{value}</b><small>{more}</small></div>" for name, value, more in cards)
    return f"<div class=cards>{inner}</div>"


def _tables(result: Result) -> list[str]:
    metrics, scenario = result.metrics, result.scenario
    tables = [
        _table(
            "Seconds",
            ("", "mean", "p50", "p90", "p95", "p99"),
            [
                (name, *(time_text(seconds) for seconds in metrics[key].values()))
                for name, key in (
                    ("time to first token", "first_token_s"),
                    ("time per output token", "token_s"),
                    ("whole answer", "total_s"),
                )
            ],
        ),
        _recoveries(metrics),
        _table(
            "Nodes",
            ("node", "count", "replicas", "used", "exits", "busy", "busiest", "tasks waiting")
            + ("outages", "parked", "of KV cache", "energy", "cost", "profile"),
            [
                (
                    node.name,
                    f"{found['count']:,}",
                    f"{found['replicas']:,}",
                    f"{found['used']:,}",
                    " ".join(map(str, node.exits)),
                    f"{found['utilisation']:.1%}",
                    f"{found['highest_utilisation']:.1%}",
                    f"{found['queue']:.2f}",
                    f"{found['outages']:,}",
                    f"{found['parked']:,}",
                    f"{found['parked_share']:.0%}",
                    f"{found['energy_j']:,.0f} J",
                    dollars(found["cost_usd"]),
                    found["profile"],
                )
                for node, found in zip(scenario.nodes, metrics["nodes"].values(), strict=True)
            ],
        ),
        _table(
            "Links",
            ("link", "up", "down", "up, mean", "down, mean", "busy", "busiest", "energy", "cost"),
            [
                (
                    name,
                    bytes_text(found["bytes_up"]),
                    bytes_text(found["bytes_down"]),
                    f"{found['up_mbit']:,.3f} Mbit/s",
                    f"{found['down_mbit']:,.3f} Mbit/s",
                    *(f"{found[key]:.1%}" if limited else "no limit" for key in ("utilisation", "highest_utilisation")),
                    f"{found['energy_j']:,.0f} J",
                    dollars(found["cost_usd"]),
                )
                for i, (name, found) in enumerate(metrics["links"].items())
                if (link := scenario.link_after(i)) is not None
                for limited in [link.up_mbit or link.down_mbit]
            ],
        ),
    ]
    return tables if metrics["failed"] < metrics["requests"] else tables[1:]


def _recoveries(metrics: Mapping[str, Any]) -> str:
    """Return a table of the times that answers lost a node; nothing if none did."""
    found, seconds = metrics["recoveries"], metrics["recoveries"]["seconds"]
    if not metrics["losses"]:
        return ""
    rows = [
        ("answers that lost a node and went on", f"{found['requests']:,}"),
        ("recoveries", f"{found['count']:,}: {counts_text(found['causes'])}"),
        ("losses, attempts included", f"{sum(metrics['losses'].values()):,}: {counts_text(metrics['losses'])}"),
        ("positions sent again", f"{found['positions']:,}"),
        ("time of a recovery", _spread_text(seconds)),
        ("longest pause in an answer", _spread_text(metrics["gap_s"])),
    ]
    return _table("Recoveries", ("", ""), rows)


def counts_text(counts: Mapping[str, int]) -> str:
    """Return counts by name as a text: 12 reset, 3 silent."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"


def _spread_text(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {time_text(seconds[name])}" for name in ("p50", "p95", "worst"))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML; nothing if it has no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{title}</h2><div class=wide><table><tr>{head}</tr>{body}</table></div>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
:root { --page: #fff; --ink: #1b1f24; --faint: #c9ced4; --card: #f4f5f7; --bad: #b3261e; color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e4e7ea; --faint: #4a5159; --card: #1f2429; --bad: #ff8a80 }
}
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
body { max-width: 1120px; margin: 2em auto; padding: 0 1em }
h1 { margin: 0 } h1 + p { margin: 0 } h2 { font-size: 1.1em; margin: 2em 0 .4em }
.finding { font-size: 1.15em; border-left: 4px solid #d55e00; padding-left: .8em } .bad { color: var(--bad) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(150px, 22%), 1fr)); gap: .6em }
.cards div { background: var(--card); border-radius: 6px; padding: .5em .8em; font-size: .85em }
.cards b { display: block; font-size: 1.5em; line-height: 1.3 } .cards small { opacity: .75 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em }
th, td { text-align: right; padding: .25em .8em; border-bottom: 1px solid var(--faint); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
figure { margin: 0 } svg { width: 100%; height: auto; display: block }
svg text { font-family: system-ui, sans-serif !important }
figcaption { font-size: .85em; display: flex; flex-wrap: wrap; gap: 0 1.4em }
figcaption i { display: inline-block; width: 1em; height: .8em; margin-right: .4em; background: currentColor }
figcaption .queue { background: repeating-linear-gradient(-45deg, currentColor 0 1.5px, transparent 1.5px 4px) }
figcaption .room { background: repeating-conic-gradient(currentColor 0 25%, transparent 0 50%) 0 0 / 4px 4px }
figcaption .wire { opacity: .3 } figcaption .line { height: 2px; vertical-align: .3em }
figcaption .tick { width: 2px; vertical-align: -.1em }
figcaption .dots { height: 0; background: none; border-top: 2px dotted; vertical-align: .3em }
pre { background: var(--card); padding: 1em; overflow-x: auto; border-radius: 6px }
summary { cursor: pointer; margin-top: 2em }
</style>
</head>
<body>
BODY
</body>
</html>
"""
