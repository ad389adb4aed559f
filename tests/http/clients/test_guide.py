"""The guide to clients: each snippet that it shows works as it stands, but for the port."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ruyi_flow import Client
from ruyi_flow.testing import cut_topology, tiny_family
from tests.families import MIN_VOCAB, add_tokenizer
from tests.http.clients.guide import ADDRESS, TEXT, sections
from tests.http.clients.served import Served, serve_topology


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of a tiny family that has the demo family's name and one of its exits."""
    folder = tiny_family(
        tmp_path_factory.mktemp("families") / "smollm2",
        exits=(5, 11),
        vocab_size=MIN_VOCAB,
        eos_token_id=256,
        max_position_embeddings=4096,
    )
    topology = cut_topology(add_tokenizer(folder), [[5], [11]], limits={"max_positions": 65536, "grace_s": 1})
    with serve_topology(topology, tmp_path_factory.mktemp("served")) as running:
        yield running


def shell(served: Served, command: str) -> str:
    """Run a snippet with bash, and return what it prints."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace(ADDRESS, served.url)],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_snippet_is_run_by_a_test() -> None:
    # LiteLLM's by `make client-trial`, and the harness's by test_lm_eval.py
    assert sections("python").keys() == {"openai", "LangChain", "LiteLLM"}
    assert {name: len(found) for name, found in sections("bash").items()} == {
        "curl": 2,
        "Open WebUI": 1,
        "lm-evaluation-harness": 2,
    }
    assert not re.search(r"^```(?!python|bash|\n)", TEXT, re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: Served) -> None:
    stream, models = sections("bash")["curl"]
    data = re.findall(r"^data: (.*)$", shell(served, stream), re.MULTILINE)
    assert data.pop() == "[DONE]" and json.loads(data[-1])["choices"][0]["finish_reason"] in ("length", "stop")
    assert "smollm2@exit-11" in [model["id"] for model in json.loads(shell(served, models))["data"]]


def test_openai(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = sections("python")["openai"]
    exec(code.replace(ADDRESS, served.url))
    assert len(capsys.readouterr().out) > 10


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_langchain(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = sections("python")["LangChain"]
    exec(code.replace(ADDRESS, served.url))
    with Client(served.cluster.topology) as sdk:
        questions = ("What is the capital of France?", "How do I make tea?")
        answers = [sdk.generate(text, max_new_tokens=32).text for text in questions]
    assert capsys.readouterr().out == "\n".join(answers)


def test_open_webui_is_told_where_the_server_is(served: Served) -> None:
    [command] = sections("bash")["Open WebUI"]
    said = shell(served, f'{command}\necho "$OPENAI_API_BASE_URL $OPENAI_API_KEY"')
    assert said == f"{served.base_url} none\n"  # where test_open_webui.py sends its calls
