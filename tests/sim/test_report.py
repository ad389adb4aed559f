"""The report.html and the trace.json of a run."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.sim.report import bottleneck, write_report
from ruyi_flow.sim.results import Result
from ruyi_flow.sim.run import Simulation, simulate
from ruyi_flow.sim.scenario import Scenario

EXITS = (2, 4, 6, 8)


def scenario(folder: Path, **changes: Any) -> Scenario:
    """Return a scenario of four phones, an edge node and a cloud node with a family of four exits."""

    def stage(exit: int) -> StageCost:
        return StageCost(
            exit, exit - 2, (1, 64), (0.004, 0.02), (0.001, 0.004), (0.0005, 0.002), 1e-7, 1e-8, 2e-4, 0, 0
        )

    costs = Profile("measured", "a test", "fam", 64, 512, tuple(map(stage, EXITS)), exchange_s=0.001)
    costs.save(folder / "costs.msgpack")
    data: dict[str, Any] = {
        "family": "fam",
        "profile": "costs.msgpack",
        "nodes": [
            {"name": "phone", "exits": [2], "count": 4, "busy_w": 4},
            {"name": "edge", "exits": [4, 6]},
            {"name": "cloud", "exits": [8], "price_per_hour": 1.5},
        ],
        "links": [
            {"from": "phone", "to": "edge", "round_trip_ms": 10, "up_mbit": 2, "timeout_s": 5},
            {"from": "edge", "to": "cloud", "round_trip_ms": 30, "jitter_ms": 2},
        ],
        "policy": {"mode": "token", "threshold": 0.7, "draft": 2},
        "behaviour": {"agreement": {2: 0.6, 4: 0.7, 6: 0.8}},
        "load": {"arrivals": {"rate": 3.0}, "requests": 25, "answers": {"tokens": 20}},
    }
    return Scenario.from_data({**data, **changes}, base=folder, where="town.yaml")


def run(folder: Path, **changes: Any) -> tuple[Result, Page]:
    result = simulate(scenario(folder, **changes), folder / "run", where="town.yaml")
    return result, Page((folder / "run" / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Page]:
    """Return the folder, the result and the report of a run of the unchanged scenario."""
    folder = tmp_path_factory.mktemp("town")
    return folder / "run", *run(folder)


class Page(HTMLParser):
    """The words, headings, rows and plots of a page, and everything that it would fetch."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.words, self.headings = text, "", list[str]()
        self.rows, self.fetches, self.open = list[list[str]](), list[str](), list[str]()
        self.plots: list[list[str]] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        about = {key: value or "" for key, value in attrs}
        for key in ("src", "href", "xlink:href", "action", "data"):
            if not about.get(key, "#").startswith("#"):
                self.fetches.append(about[key])
        if "id" in about:
            self.ids.append(about["id"])
        if tag in ("script", "link", "iframe", "object", "img"):
            self.fetches.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "svg":
            self.plots.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed, but something else is open"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1].append(data)
        elif self.open[-1:] == ["h2"]:
            self.headings.append(data)
        elif "svg" in self.open and data.strip():
            self.plots[-1].append(data.strip())
        if self.open[-1:] != ["style"]:
            self.words += data


def test_a_report_shows_the_run_and_needs_nothing_else(town: tuple[Path, Result, Page]) -> None:
    _, result, page = town
    metrics = result.metrics
    assert page.open == [] and page.fetches == [] and "http:" not in page.text and "url(h" not in page.text
    plots = ["Latency", "Over time", "Tokens and bytes", "Requests"]
    assert page.headings == [*plots, "Seconds", "Nodes", "Links"] and len(page.plots) == 4
    assert "seed 0" in page.words and page.words.count("town") >= 2 and "25" in page.words
    assert bottleneck(metrics) in page.words and result.scenario.text() in page.words
    rows = {row[0]: row for row in page.rows if row}
    assert rows["edge"][5] == f"{metrics['nodes']['edge']['utilisation']:.1%}"
    assert rows["phone"][11] == f"{metrics['nodes']['phone']['energy_j']:,.0f} J" != "0 J"
    assert rows["phone-edge"][5] == f"{metrics['links']['phone-edge']['utilisation']:.1%}" != "0.0%"
    assert rows["edge-cloud"][5] == "no limit"
    latency, over_time, decided, requests = page.plots
    assert {"time to first token", "time per output token", "time of the whole answer"} <= set(latency)
    assert {"tokens", "per second", "links,"} <= set(over_time) and any(
        "s of virtual time" in word for word in over_time
    )
    assert {"2", "4", "6", "8", "phone-edge, up", "edge-cloud, down"} <= set(decided)
    assert {"mean", f"#{result.recorder.chosen[0].number}"} <= set(requests)
    assert any(word.endswith("20 tokens") for word in requests)


def test_the_same_run_gives_the_same_report_whatever_the_style_of_plots(
    tmp_path: Path, town: tuple[Path, Result, Page]
) -> None:
    _, result, first = town
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        simulate(result.scenario, tmp_path / "again", where="town.yaml")
    assert (tmp_path / "again" / "report.html").read_text(encoding="utf-8") == first.text
    assert dict(matplotlib.rcParams) == before
    _, other = run(tmp_path, seed=1)
    assert first.text != other.text


def test_colours_of_text_and_axes_are_the_pages_own(town: tuple[Path, Result, Page]) -> None:
    _, _, page = town
    plots = page.text[page.text.index("<svg") :]
    assert "var(--ink)" in plots and "var(--faint)" in plots and "#000000" not in plots and "#ffffff" not in plots


def test_every_clip_and_marker_that_a_plot_names_is_there(town: tuple[Path, Result, Page]) -> None:
    _, _, page = town
    for named in page.text.split("url(#")[1:] + page.text.split('xlink:href="#')[1:]:
        assert named[: min(named.find(end) for end in ')"' if end in named[:40])] in page.ids


def test_one_node_has_no_link_to_show(tmp_path: Path) -> None:
    alone = {"nodes": [{"name": "solo", "exits": [*EXITS]}], "links": []}
    result, page = run(tmp_path, **alone)
    assert "Links" not in page.headings and result.metrics["links"] == {}
    assert page.open == [] and len(page.plots) == 4
    assert not any("link" in word or "MB" in word for plot in page.plots for word in plot)


def test_one_token_has_no_time_per_token_to_show(tmp_path: Path) -> None:
    load = {"requests": 1, "answers": {"tokens": 1}}
    _, page = run(tmp_path, load=load)
    assert "time per output token" not in page.plots[0] and "time to first token" in page.plots[0]
    assert any(word.endswith(", 1 token") for word in page.plots[3])


def test_a_run_that_takes_no_time_is_shown_too(tmp_path: Path) -> None:
    free = tuple(StageCost(p, p - 2, (1,), (0.0,), (0.0,), (0.0,)) for p in EXITS)
    Profile("measured", "free", "fam", 64, 512, free).save(tmp_path / "free.msgpack")
    nodes = [{"name": "solo", "exits": [*EXITS]}]
    result, page = run(tmp_path, nodes=nodes, links=[], profile="free.msgpack")
    assert result.metrics["total_s"]["mean"] == 0 and result.metrics["tokens"] == 500 and len(page.plots) == 4


def test_failures_alone_are_reported_and_not_plotted(tmp_path: Path) -> None:
    nodes = [
        {"name": "phone", "exits": [2], "count": 4},
        {"name": "edge", "exits": [4, 6, 8], "down": [{"at_s": 0, "for_s": 1e6}]},
    ]
    links = [{"from": "phone", "to": "edge", "timeout_s": 5}]
    result, page = run(tmp_path, nodes=nodes, links=links, policy={"mode": "fixed", "exit": 8})
    assert result.metrics["failed"] == 25 and result.metrics["tokens"] == 0
    assert page.plots == [] and page.headings == ["Recoveries", "Nodes", "Links"] and page.open == []
    assert "25 of 25 requests failed: 25 NodeUnavailable" in page.words
    assert "No request was answered" in page.words


def test_answers_that_all_broke_off_are_not_plotted_either(tmp_path: Path) -> None:
    nodes = [{"name": "phone", "exits": [2, 4, 6, 8], "count": 25, "down": [{"at_s": 0.5, "for_s": 1e6}]}]
    load = {"arrivals": {"kind": "closed", "users": 25}, "requests": 25, "answers": {"tokens": 200}}
    result, page = run(tmp_path, nodes=nodes, links=[], load=load)
    assert result.metrics["failed"] == 25 and result.metrics["tokens"] > 25
    assert page.plots == [] and "No request was answered" in page.words


def test_what_people_write_is_no_html(tmp_path: Path) -> None:
    result = Simulation(scenario(tmp_path, family="<b>fam & co</b>")).run()
    odd = Result(result.scenario, result.metrics, result.recorder, 'a <script>x</script> & "BODY" TITLE')
    write_report(tmp_path, odd)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.fetches == [] and page.open == [] and "<b>fam & co</b> over" in page.words
    assert 'a <script>x</script> & "BODY" TITLE' in page.words


def test_a_report_stays_small(tmp_path: Path) -> None:
    exits = tuple(range(2, 34, 2))
    stages = tuple(StageCost(p, p - 2, (1,), (0.001,), (0.001,), (0.0,)) for p in exits)
    Profile("measured", "many", "fam", 64, 512, stages).save(tmp_path / "many.msgpack")
    spans = [{"at_s": 1 + i / 20, "for_s": 0.001} for i in range(6000)]
    nodes = [{"name": f"n{p}", "exits": [p]} for p in exits]
    nodes[3] |= {"down": spans}
    links = [
        {"from": a["name"], "to": b["name"], "up_mbit": 5, "recover_s": 0}
        for a, b in zip(nodes, nodes[1:], strict=False)
    ]
    result, page = run(
        tmp_path,
        profile="many.msgpack",
        nodes=nodes,
        links=links,
        policy={"mode": "token", "threshold": 0.9, "fallback": True},
        behaviour={"agreement": dict.fromkeys(exits[:-1], 0.2)},
        load={"requests": 120, "arrivals": {"rate": 30}, "answers": {"tokens": 12}},
    )
    assert result.metrics["tokens"] > 500
    assert len(page.text) < 1_500_000 and page.open == []
    assert "the rest is in scenario.yaml" in page.words


def test_without_matplotlib_a_report_has_all_but_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    simulate(scenario(tmp_path), tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "they need matplotlib, pip install 'ruyi-flow[sim]'" in page and "<svg" not in page and "<table" in page


# ---- the sentence ----


def figures(busy: tuple[float, float], link: float, **spent: tuple[float, float]) -> dict[str, Any]:
    """Return metrics of a run over a phone and a cloud, with what the mean request spent on each, by part."""
    parts = {
        name: {k: spent.get(k, (0, 0))[i] for k in ("room", "compute", "queue", "wire")}
        for i, name in enumerate(("phone", "cloud"))
    }
    return {
        "requests": 10,
        "failed": 0,
        "total_s": {"mean": 4.0},
        "spent_s": parts,
        "nodes": {"phone": {"utilisation": busy[0]}, "cloud": {"utilisation": busy[1]}},
        "links": {"phone-cloud": {"utilisation": link}},
    }


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (figures((0.1, 0.2), 0.05, compute=(2.0, 0.5), wire=(0, 1.0)), "computing on phone, 50%; no node or link"),
        (figures((0.1, 0.2), 0.05, compute=(0.5, 0.5), wire=(0, 3.0)), "the network to cloud and back, 75%"),
        (figures((0.1, 0.25), 0.05, room=(0, 2.4), compute=(1, 0)), "waiting for admission to cloud (its limits), 60%"),
        (
            figures((0.1, 0.25), 0.05, queue=(1.0, 0)),
            "a step of phone, 25%; no node or link is a bottleneck, the busiest is cloud",
        ),
        (figures((0.1, 0.25), 0.3, compute=(1.0, 0)), "the busiest is the link phone-cloud, 30.0% of the time"),
        (
            figures((0.1, 0.95), 0.3, compute=(1.0, 0.5), queue=(0, 2.5)),
            "is cloud, busy 95% of the time; its work and waiting for it",
        ),
        (figures((0.1, 0.95), 0.3, compute=(1.0, 0.5), queue=(0, 2.5)), "take 75% of the mean request's 4 s."),
        (figures((0.1, 0.85), 0.99, wire=(0, 3.6)), "is the link phone-cloud, busy 99% of the time"),
        # Drafting past a question overlaps with it: the parts are more than the whole.
        (figures((0.1, 0.2), 0.05, compute=(6.0, 0.0), wire=(0, 2.0)), "computing on phone, 75%"),
    ],
)
def test_the_bottleneck_is_named(found: dict[str, Any], sentence: str) -> None:
    assert sentence in bottleneck(found)


def test_the_bottleneck_of_a_full_link_is_the_link(tmp_path: Path) -> None:
    links = [
        {"from": "phone", "to": "edge", "round_trip_ms": 10, "up_mbit": 0.05, "shared": True},
        {"from": "edge", "to": "cloud"},
    ]
    result, page = run(
        tmp_path, links=links, load={"requests": 25, "arrivals": {"rate": 20}, "answers": {"tokens": 20}}
    )
    assert result.metrics["links"]["phone-edge"]["utilisation"] > 0.9
    assert "The bottleneck is the link phone-edge" in page.words


# ---- the trace ----


def test_the_trace_has_every_step_and_message_on_named_threads(town: tuple[Path, Result, Page]) -> None:
    folder, result, _ = town
    found = json.loads((folder / "trace.json").read_text())
    assert len(found) < 40_000, "all of it"
    processes = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert {"requests", "phone", "edge", "cloud", "link phone-edge", "link edge-cloud"} == set(processes.values())
    busy: dict[str, float] = defaultdict(float)
    carried: dict[tuple[str, str], int] = defaultdict(int)
    ends: dict[tuple[int, int], float] = defaultdict(float)
    for e in sorted((e for e in found if e["ph"] == "X"), key=lambda e: float(e["ts"])):
        key, process = (e["pid"], e["tid"]), processes[e["pid"]]
        assert e["ts"] >= ends[key] - 0.01, "slices of a thread do not overlap"
        ends[key] = e["ts"] + e["dur"]
        if process.startswith("link "):
            assert e["dur"] >= 5000 - 0.01, "half of a round trip at the least"
            carried[process.removeprefix("link "), threads[key].split()[0]] += e["args"]["bytes"]
        else:
            assert threads[key].split()[0] == process
            busy[process] += e["dur"] / 1e6
    for name, node in result.metrics["nodes"].items():
        assert busy[name] == pytest.approx(node["busy_s"], rel=1e-4)
    for name, link in result.metrics["links"].items():
        assert (carried[name, "up"], carried[name, "down"]) == (link["bytes_up"], link["bytes_down"]) and link[
            "bytes_up"
        ]
    requests: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for e in found:
        if e.get("cat") == "request":
            requests[e["id"]].append(e)
    assert sorted(requests) == list(range(25))
    for events in requests.values():
        assert [e["ph"] for e in events] == ["b", "n", "e"]
        assert events[0]["ts"] <= events[1]["ts"] <= events[2]["ts"]


def test_time_over_the_run_adds_up(town: tuple[Path, Result, Page]) -> None:
    _, result, _ = town
    timeline, metrics = result.recorder.timeline, result.metrics

    def total(name: str) -> float:
        return sum(timeline.rate(name)) * timeline.width_s

    for name, node in metrics["nodes"].items():
        assert total(f"busy {name}") == pytest.approx(node["busy_s"])
        assert max(timeline.rate(f"busy {name}")) <= node["count"] + 1e-6, "no more than all of them at once"
    for name, link in metrics["links"].items():
        assert total(f"up {name}") == pytest.approx(link["bytes_up"])
    assert total("tokens") == metrics["tokens"]


def test_waiting_for_admission_is_neither_work_nor_network_time(tmp_path: Path) -> None:
    nodes = [
        {"name": "phone", "exits": [2], "count": 4},
        {"name": "cloud", "exits": [4, 6, 8], "limits": {"max_sessions": 1, "max_wait_s": 600}},
    ]
    links = [{"from": "phone", "to": "cloud", "round_trip_ms": 10, "timeout_s": 600}]
    load = {"requests": 12, "arrivals": {"kind": "even", "rate": 20}, "answers": {"tokens": 20}}
    result, page = run(tmp_path, nodes=nodes, links=links, policy={"mode": "fixed", "exit": 8}, load=load)
    spent, mean = result.metrics["spent_s"], result.metrics["total_s"]["mean"]
    assert spent["cloud"]["room"] > 0.5 * mean and spent["phone"]["room"] == 0
    assert spent["cloud"]["wire"] < 0.5 * mean
    assert sum(sum(parts.values()) for parts in spent.values()) == pytest.approx(mean, rel=0.05)
    assert "room" in page.text and "for admission" in page.plots[1]
