"""What reads the metrics: the dashboard, the alert rules and Prometheus' settings in deploy/ use names that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ruyi_flow.telemetry import names
from ruyi_flow.telemetry.names import Kind, Metric

DEPLOY = Path(__file__).parents[2] / "deploy"
ROWS = ("Service", "Tiers", "Links", "Recovery", "Nodes", "Calibration", "HTTP")


def series_of(metric: Metric) -> list[str]:
    """Names of a metric's series."""
    if metric.kind is Kind.HISTOGRAM:
        return [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
    return [metric.name]


KNOWN = {name: metric for metric in names.ALL for name in series_of(metric)}


def used_in(expression: str) -> set[str]:
    """Names of the metrics in an expression; all of them exist, and have the labels that it names."""
    found = set(re.findall(r"\bruyi_\w+", expression))
    assert found or re.search(r"\b(up|process_\w+)\b", expression), expression
    assert found <= KNOWN.keys(), found - KNOWN.keys()
    for name, inner in re.findall(r"(ruyi_\w+)\{([^}]*)\}", expression):
        labels = set(re.findall(r"(\w+)\s*[=!]~?\s*\"", inner))
        assert labels <= set(KNOWN[name].all_labels), expression
    known = {label for name in found for label in KNOWN[name].all_labels} | {"instance", "le"}
    for group in re.findall(r"\b(?:by|on|ignoring|group_left)\s*\(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= known, expression
    return {KNOWN[name].name for name in found}


@pytest.mark.parametrize(
    "expression",
    ["rate(ruyi_no_such_total[5m])", 'ruyi_tokens_total{exits="5"}', "sum by (nod) (ruyi_tokens_total)", "1"],
)
def test_an_expression_of_something_that_is_not_there_is_noticed(expression: str) -> None:
    with pytest.raises(AssertionError):
        used_in(expression)


def dashboard() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    return data


def test_the_dashboard_has_each_metric_in_the_row_that_its_readers_name() -> None:
    row, shown = "", set()
    for panel in dashboard()["panels"]:
        row = panel["title"] if panel["type"] == "row" else row
        shown |= {(row, name) for target in panel.get("targets", ()) for name in used_in(target["expr"])}
    named = {
        (row, m.name) for m in names.ALL for row in ROWS if re.search(rf"\b{row}\b", re.sub("alert.*", "", m.readers))
    }
    assert named <= shown
    assert shown - named <= {("Tiers", "ruyi_generation_tokens_total"), ("Links", "ruyi_generation_tokens_total")}


def test_the_dashboard_can_be_imported() -> None:
    data = dashboard()
    panels = data["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    [variable] = data["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    provisioned = yaml.safe_load((DEPLOY / "grafana/datasource.yaml").read_text())["datasources"][0]
    assert variable["current"]["value"] == provisioned["uid"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, f"{panel['title']} covers another panel"
        taken |= cells


def test_alerts_use_metrics_that_exist_and_are_those_that_their_readers_name() -> None:
    [group] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    used = set()
    for rule in group["rules"]:
        used |= {(rule["alert"], name) for name in used_in(rule["expr"])}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])
    named = {(alert, m.name) for m in names.ALL for alert in re.findall(r"\balert (\w+)", m.readers)}
    assert named <= used


def test_prometheus_asks_where_the_nodes_and_the_server_answer() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    assert [(DEPLOY / file).exists() for file in settings["rule_files"]] == [True]
    jobs = settings["scrape_configs"]
    targets = [t for job in jobs for one in job.get("static_configs", ()) for t in one["targets"]]
    names = [
        (f"{name}:{one['port']}", one["type"])
        for job in jobs
        for one in job.get("dns_sd_configs", ())
        for name in one["names"]
    ]
    nodes = yaml.safe_load((DEPLOY / "compose-topology.yaml").read_text())["nodes"]
    command = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]["command"]
    port = command[command.index("--port") + 1]
    assert targets == [f"server:{port}"] and all(node["metrics"].startswith("0.0.0.0:") for node in nodes)
    metrics = [node["metrics"].replace("0.0.0.0", node["address"].partition(":")[0]) for node in nodes]
    assert names == [(address, "A") for address in metrics], "a name stands for every replica"
    selected = re.findall(
        r'job=~"([^"]+)"', (DEPLOY / "alerts.yaml").read_text() + json.dumps(dashboard()).replace("\\", "")
    )
    assert selected and all(
        re.fullmatch(pattern, job) for pattern in selected for job in {job["job_name"] for job in jobs}
    )
