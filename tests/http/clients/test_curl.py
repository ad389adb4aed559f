"""curl, as people type it into a shell."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ruyi_flow import Client
from ruyi_flow.testing import Relay
from tests.http.clients.served import Served, events

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

JSON = ("-H", "Content-Type: application/json")


def curl(*arguments: str, status: int = 0, body: bytes | None = None) -> str:
    """Run curl with a body as its standard input, and return what it prints."""
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "30", *arguments]
    done = subprocess.run(command, input=body, capture_output=True)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode()


def asked(**changes: object) -> str:
    """Return the body of a chat."""
    body = {"model": "spoken", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 12}
    return json.dumps(body | changes)


def test_a_chat(served: Served, sdk: Client) -> None:
    said = curl(f"{served.base_url}/chat/completions", *JSON, "-d", asked())
    assert json.loads(said)["choices"][0]["message"]["content"] == sdk.generate("hi", max_new_tokens=12).text


def test_a_body_without_a_type_is_taken_for_json(served: Served) -> None:
    said = curl(f"{served.base_url}/chat/completions", "-d", asked())  # curl calls it a form then
    assert json.loads(said)["usage"]["completion_tokens"] == 12


def test_a_stream(served: Served, sdk: Client) -> None:
    said = curl("-N", "-i", f"{served.base_url}/chat/completions", *JSON, "-d", asked(stream=True))
    head, _, rest = said.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200") and "text/event-stream" in head.lower()
    assert "x-request-id: " in head.lower()
    data = events(rest)
    assert data.pop() == "[DONE]"
    text = "".join(c["delta"].get("content") or "" for one in data for c in json.loads(one)["choices"])
    assert text == sdk.generate("hi", max_new_tokens=12).text
    assert rest.count("\n\n") >= len(data), "an event must end with an empty line"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("-d", "{"), 400),
        (("-d", '{"model": "gone", "messages": [{"role": "user", "content": "hi"}]}'), 404),
        (("-X", "DELETE"), 405),
        (("-X", "PUT", "-d", "{}"), 405),
    ],
)
def test_errors(served: Served, arguments: tuple[str, ...], status: int) -> None:
    said = curl("-w", "\n%{http_code} %{content_type}", f"{served.base_url}/chat/completions", *JSON, *arguments)
    body, _, code = said.rpartition("\n")
    assert code.split()[:2] == [str(status), "application/json"]
    assert json.loads(body)["error"]["message"]


def test_a_status_becomes_curls_own(served: Served) -> None:
    assert curl("--fail", f"{served.base_url}/models/gone", status=22) == ""
    assert '"ok"' in curl("--fail", f"{served.url}/health")
    assert curl("--fail", f"{served.url}/ready")


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/spoken"])
def test_monitors_may_ask_for_the_head_alone(served: Served, path: str) -> None:
    said = curl("--head", f"{served.url}{path}")
    assert said.startswith("HTTP/1.1 200") and "x-request-id" in said.lower()


@pytest.mark.parametrize("path", ["/v1/models/", "/v1", "/", "//v1/models", "/v1/chat/completions/", "/v1/responses/x"])
@pytest.mark.parametrize("body", [(), ("-d", "{}")])
def test_a_path_that_is_not_there_is_an_error_of_the_right_shape(
    served: Served, path: str, body: tuple[str, ...]
) -> None:
    said, _, code = curl("-w", "\n%{http_code}", "--path-as-is", f"{served.url}{path}", *body).rpartition("\n")
    assert code in ("404", "405") and json.loads(said)["error"]["type"] == "invalid_request_error"


def test_a_compressed_body_is_refused_by_name(served: Served) -> None:
    given = ("-H", "Content-Encoding: gzip", "--data-binary", "@-")
    said = curl(f"{served.base_url}/chat/completions", *JSON, *given, body=gzip.compress(asked().encode()))
    assert "content-encoding" in json.loads(said)["error"]["message"].lower()


def test_a_body_that_is_too_large_is_refused(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    file.write_bytes(b'{"model": "spoken", "messages": [{"role": "user", "content": "' + b"a" * 50_000_000 + b'"}]}')
    asked = ("-w", "\n%{http_code}", f"{served.base_url}/chat/completions", *JSON, "--data-binary", f"@{file}")
    body, _, code = curl(*asked, "-H", "Expect:").rpartition("\n")
    assert code == "413" and json.loads(body)["error"]["message"]
    # Who waits for `100 Continue` need not send it at all.
    body, _, code = curl(*asked, "--expect100-timeout", "20").rpartition("\n")
    assert code == "413" and json.loads(body)["error"]["message"]
    # The same in pieces, whose length nobody says before.
    said = curl(*asked, "-H", "Expect:", "-H", "Transfer-Encoding: chunked")
    assert said.rpartition("\n")[2] == "413"
    assert '"ok"' in curl(f"{served.url}/health")


def test_headers_without_end_are_refused(served: Served) -> None:
    flood = [part for i in range(300) for part in ("-H", f"X-Flood-{i}: {'a' * 1000}")]
    said = curl("-w", "\n%{http_code}", f"{served.base_url}/models", *flood)
    assert said.rpartition("\n")[2] in ("400", "431")
    assert '"ok"' in curl(f"{served.url}/health")


def test_ending_curl_ends_the_work(far: tuple[Served, Relay]) -> None:
    served, _ = far
    body = asked(model="endless@exact", max_tokens=20_000, stream=True)
    command = ["curl", "-N", "-s", "--noproxy", "*", f"{served.base_url}/chat/completions", *JSON, "-d", body]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert all(served.sessions().values())
        process.terminate()
    served.seconds_until_idle()
