"""Options of traces and of the request log, as node and up take them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from ruyi_flow.cli.telemetry import Tracing, log_to_stderr
from ruyi_flow.errors import ConfigError
from ruyi_flow.telemetry.spans import NO_TRACER
from tests.conftest import Command


@pytest.mark.parametrize("command", [("up",), ("node", "device")])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trace-share", "0.5"), "--trace-share requires --trace FILE or --otlp URL"),
        (("--otlp", "localhost:4318"), "--otlp localhost:4318: is no address of a collector"),
        (("--trace", "nowhere/t.json"), "nowhere/t.json: cannot be written: No such file or directory"),
        (("--trace", "notes.txt"), "notes.txt: is not a trace that nodes may continue"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    run: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("buy milk\n")
    code, _, err = run(*command, *options)
    assert code == 2 and f"error: {message}" in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "notes.txt").read_text() == "buy milk\n"


def test_without_the_extra_the_message_says_how_to_install_it(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ruyi_flow.telemetry.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    code, _, err = run("up", "--otlp", "http://localhost:4318")
    assert code == 2
    assert "--otlp needs OpenTelemetry, which is not installed: pip install 'ruyi-flow[otel]'" in err


@pytest.mark.parametrize(
    ("trace", "otlp", "share", "expected"),
    [(True, False, None, 1.0), (False, True, None, 0.01), (True, True, None, 1.0), (True, False, 0.25, 0.25)],
)
def test_a_file_has_every_request_and_a_collector_one_in_a_hundred(
    tmp_path: Path, trace: bool, otlp: bool, share: float | None, expected: float
) -> None:
    tracing = Tracing(tmp_path / "t.json" if trace else None, "http://127.0.0.1:1" if otlp else None, share)
    tracer = tracing.tracer("device")
    recorded = sum(bool(tracer.start("request")) for _ in range(4000)) / 4000
    assert recorded == pytest.approx(expected, abs=0.05 if share else 0.009)
    tracer.close()
    assert Tracing(None, None, None).tracer("device") is NO_TRACER


def test_the_nodes_of_up_get_the_same_options_and_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('[\n{"ph": "M"},\n')
    options = Tracing(path, "http://collector:4318", 0.5).begin()
    assert options == ["--trace", str(path), "--otlp", "http://collector:4318", "--trace-share", "0.5"]
    assert path.read_text() == "[\n"
    assert Tracing(None, None, None).begin() == []
    with pytest.raises(ConfigError, match="is no address"):
        Tracing(None, "collector", None)


@pytest.mark.parametrize(
    ("as_json", "requests", "expected"),
    [(False, True, ["INFO one", "INFO two"]), (False, False, ["INFO one"]), (True, True, ['"one"', '"two"'])],
)
def test_the_log_has_the_lines_that_are_wanted(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    as_json: bool,
    requests: bool,
    expected: list[str],
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    request_log = logging.getLogger("ruyi_flow.telemetry.request_log")
    monkeypatch.setattr(request_log, "level", logging.NOTSET)
    log_to_stderr("info", as_json=as_json, requests=requests, node="n0")
    for logger in (root, request_log):
        logger.manager._clear_cache()  # type: ignore[attr-defined]
    logging.getLogger("ruyi_flow.other").info("one")
    request_log.info("two")
    logging.getLogger("ruyi_flow.other").debug("three")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(expected) and all(text in line for text, line in zip(expected, lines, strict=True))
    root.manager._clear_cache()  # type: ignore[attr-defined]
