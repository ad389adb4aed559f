"""Options of the commands that serve: traces and the request log."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ruyi_flow.errors import ConfigError
from ruyi_flow.extras import needed_by
from ruyi_flow.telemetry.chrome_trace import ChromeTracer, SharedTrace
from ruyi_flow.telemetry.request_log import JsonLines
from ruyi_flow.telemetry.spans import NO_TRACER, Tracer

__all__ = [
    "LogJsonOption",
    "NoRequestLogOption",
    "OtlpOption",
    "TraceOption",
    "TraceShareOption",
    "Tracing",
    "log_to_stderr",
]

_PANEL = "Telemetry"

TraceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        rich_help_panel=_PANEL,
        help="Record what requests spend their time on, as a Chrome trace; ui.perfetto.dev opens it.",
    ),
]
OtlpOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        show_default=False,
        rich_help_panel=_PANEL,
        help="Send traces to the OpenTelemetry collector at this address, for instance http://localhost:4318 "
        "(OTLP over HTTP; extra otel).",
    ),
]
TraceShareOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        metavar="SHARE",
        show_default=False,
        rich_help_panel=_PANEL,
        help="Share of the requests that are traced (0 … 1). A caller who sends a traceparent decides for its own "
        "requests. Default: 1 with --trace, or else 0.01.",
    ),
]
LogJsonOption = Annotated[
    bool, typer.Option("--log-json", rich_help_panel=_PANEL, help="Write each line of the log as a JSON object.")
]
NoRequestLogOption = Annotated[
    bool, typer.Option("--no-request-log", rich_help_panel=_PANEL, help="Write no log line for each request.")
]


@dataclass(frozen=True, slots=True)
class Tracing:
    """What the options say about traces.

    Raises:
        ConfigError: they do not fit together, or the collector's address is no URL.
        MissingExtra: OpenTelemetry is not installed.
    """

    trace: Path | None
    """The file of --trace."""
    otlp: str | None
    """The address of --otlp."""
    share: float | None
    """The share of --trace-share."""

    def __post_init__(self) -> None:
        if self.trace is None and self.otlp is None and self.share is not None:
            raise ConfigError("--trace-share requires --trace FILE or --otlp URL, which say where traces go")
        if self.otlp is not None:
            with needed_by("--otlp"):
                from ruyi_flow.telemetry.otel import endpoint

            endpoint(self.otlp)

    def tracer(self, name: str) -> Tracer:
        """Return the tracer of a node or server with this name; whoever asks closes it.

        Raises:
            ConfigError: the file cannot be written, or is something else than a trace.
        """
        trace = None if self.trace is None else SharedTrace(self.trace, name)
        share = self.share if self.share is not None else 0.01 if trace is None else 1.0
        if self.otlp is not None:
            from ruyi_flow.telemetry.otel import OtelTracer

            return OtelTracer.sending(self.otlp, name, share, trace)
        return NO_TRACER if trace is None else ChromeTracer(trace, share)

    def begin(self) -> list[str]:
        """Start a new file for several processes, and return the options that pass all this on to them.

        Raises:
            ConfigError: the file cannot be written, or is something else than a trace.
        """
        if self.trace is not None:
            SharedTrace.create(self.trace)
        pairs = (("--trace", self.trace), ("--otlp", self.otlp), ("--trace-share", self.share))
        return [text for option, value in pairs if value is not None for text in (option, str(value))]


def log_to_stderr(level: str, *, as_json: bool, requests: bool, brief: bool = False, **about: str) -> None:
    """Let this process log to standard error.

    Args:
        level: name of the least severe level that is logged.
        as_json: whether each line is a JSON object.
        requests: whether each request has a line.
        brief: whether lines have the time without the date, for a terminal, where long lines wrap.
        about: fields of every line in JSON, for instance the node.
    """
    handler = logging.StreamHandler(sys.stderr)
    dates = "%H:%M:%S" if brief else None
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt=dates)
    handler.setFormatter(JsonLines(**about) if as_json else plain)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if not requests:
        logging.getLogger("ruyi_flow.telemetry.request_log").setLevel(logging.WARNING)
