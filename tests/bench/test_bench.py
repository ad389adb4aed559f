"""`ruyi-flow bench`: its output and its errors. No test depends on measured times."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from gguf import GGUFWriter

from ruyi_flow.bench.measurement import interleaved, no_report
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.testing import tiny_family
from tests.config.test_policy_file import write
from tests.conftest import Command

pytestmark = pytest.mark.timeout(120)

Measured = Callable[..., dict[str, Any]]

MACHINE = {"processor", "cores", "threads", "memory_gb", "python", "torch", "ruyi_flow", "date"}
SETTINGS = {"family", "weights", "dtype", "threads", "tokens", "rounds"}


@pytest.fixture
def measured(run: Command, spoken: Path, tmp_path: Path) -> Measured:
    """Run a benchmark of the tiny family with tiny sizes; return the JSON object of its last line."""

    def call(bench: str, *arguments: str, tokens: bool = True) -> dict[str, Any]:
        sizes = ["--rounds", "1", "--threads", "1", "--dtype", "float32", *(["--tokens", "4"] if tokens else [])]
        place = ["--family", str(spoken), "--out", str(tmp_path / "plots")]
        code, out, err = run("bench", bench, *place, *sizes, *arguments)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert set(found) == {"bench", "settings", "results", "machine", "plot"} and found["bench"] == bench
        assert set(found["machine"]) == MACHINE and set(found["settings"]) >= SETTINGS
        assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
        for name in () if "--json" in arguments else found["results"]:
            assert f"│ {name} " in out
        assert ("written: " in out) != ("--json" in arguments) and (out.count("\n") == 1) == ("--json" in arguments)
        return found

    return call


def tiny_gguf(file: Path, vocab: int) -> Path:
    """Write a Llama with random weights and no tokenizer."""
    hidden, inner = 32, 64
    writer, random = GGUFWriter(file, "llama"), np.random.default_rng(0)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    shapes = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
    shapes |= {f"blk.0.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_decode_compares_with_transformers_in_one_line(measured: Measured) -> None:
    engines = ["--against", "transformers", "--against", "transformers-early-exit"]
    found = measured("decode", *engines, "--early-exit", "2", "--json")
    speed = {"ms_per_token", "tokens_per_s"}
    rows = found["results"]
    assert list(rows) == ["ruyi-flow", "transformers", "transformers-early-exit"]
    assert set(rows["ruyi-flow"]) == speed
    assert set(rows["transformers"]) == set(rows["transformers-early-exit"]) == speed | {"ratio", "ratio_lowest"}
    assert found["settings"]["against"]["transformers-early-exit"].endswith("layers 1-2 draft")


def test_prefill_takes_a_prompt_of_the_length_asked_for(measured: Measured) -> None:
    found = measured("prefill", "--prompt-tokens", "70", "--against", "transformers", tokens=False)
    assert found["settings"]["prompt_tokens"] == 70
    assert set(found["results"]["ruyi-flow"]) == {"ms_per_prompt", "tokens_per_s"}
    assert set(found["results"]["transformers"]) == {"ms_per_prompt", "tokens_per_s", "ratio", "ratio_lowest"}


def test_llama_cpp_runs_a_gguf_file(measured: Measured, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    file = tiny_gguf(tmp_path / "tiny.gguf", 300)
    against = ("--against", "llama.cpp", "--gguf", str(file))
    for found in (measured("decode", *against), measured("prefill", *against, "--prompt-tokens", "64", tokens=False)):
        assert found["settings"]["against"]["llama.cpp"].endswith("tiny.gguf")
        assert set(found["results"]["llama.cpp"]) >= {"tokens_per_s", "ratio", "ratio_lowest"}


def test_hop_reports_the_cost_of_a_hop(measured: Measured) -> None:
    found = measured("hop")
    rows = found["results"]
    assert found["settings"]["cuts"] == [[2], [4], [6]] and list(rows) == ["process", "node", "three", "three_free"]
    added = {"beyond_process_ms_per_hop", "beyond_node_ms_per_hop"}
    parts = {f"{part}_ms_per_token" for part in ("compute", "queue", "wire")}
    assert set(rows["three"]) == {"ms_per_token"} | added | parts
    assert set(rows["three_free"]) == {"ms_per_token", "beyond_process_ms_per_hop"}


def test_wan_compares_drafts(measured: Measured, spoken: Path, tmp_path: Path) -> None:
    policy = write(tmp_path / "policy.yaml", family=Checkpoint(spoken).fingerprint)
    found = measured("wan", "--round-trip", "2", "--policy", str(policy))
    rows = found["results"]
    assert found["settings"]["round_trip_ms"] == 2 and list(rows) == ["draft_0", "draft_1", "draft_4", "adaptive"]
    for name in ("draft_1", "draft_4", "adaptive"):
        assert set(rows[name]) == {"ms_per_token", "speedup", "speedup_lowest", "held"} and 0 <= rows[name]["held"] <= 1


def test_exits_compares_a_policy_with_the_whole_family(measured: Measured, spoken: Path, tmp_path: Path) -> None:
    policy = write(tmp_path / "policy.yaml", family=Checkpoint(spoken).fingerprint)
    rows = measured("exits", "--policy", str(policy))["results"]
    assert set(rows["process"]) == {"ms_per_token"}
    assert sum(rows["three"][f"exit_{p}"] for p in Checkpoint(spoken).config.exits) == pytest.approx(1, abs=1e-3)
    assert rows["three"]["compute"] > 0


def test_serve_compares_many_with_one(measured: Measured) -> None:
    found = measured("serve", "--sessions", "3", "--rate", "50")
    rows = found["results"]
    quantiles = {f"{what}_p{q}_ms" for what in ("first_token", "token") for q in (50, 95)}
    assert set(rows["alone"]) == {"tokens_per_s"} | quantiles
    assert set(rows["together"]) == set(rows["alone"]) | {"times_alone", "times_alone_lowest"}
    assert found["settings"]["sessions"] == 3 and found["settings"]["rate"] == 50


@pytest.mark.parametrize("bench", ["serve", "wan"])
def test_an_answer_that_ends_early_is_an_error(run: Command, spoken: Path, tmp_path: Path, bench: str) -> None:
    short = shutil.copytree(spoken, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 70}))
    sizes = ("--tokens", "60", "--rounds", "1", "--threads", "1")
    code, out, err = run("bench", bench, "--family", str(short), "--out", str(tmp_path), *sizes)
    assert code == 2 and out == "" and "ended after" in err and "of 60 tokens; is its context too short?" in err


def test_compared_runs_are_interleaved_and_the_first_round_warms_up() -> None:
    assert list(interleaved(["a", "b"], 1, no_report)) == [("a", False), ("b", False), ("a", True), ("b", True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--rounds", "0"), "Invalid value for '--rounds'"),
        (("decode", "--tokens", "1"), "Invalid value for '--tokens'"),
        (("serve", "--sessions", "0"), "Invalid value for '--sessions'"),
        (("prefill", "--prompt-tokens", "0"), "Invalid value for '--prompt-tokens'"),
        (("wan", "--round-trip", "-1"), "Invalid value for '--round-trip'"),
        (("decode", "--weights", "int3"), "'int3' is not one of"),
        (("decode", "--against", "vllm"), "'vllm' is not one of"),
        (("decode", "--dtype", "int8"), "dtype is 'int8'"),
        (("decode", "--device", "cuda:99"), "device: 'cuda:99' cannot be used here"),
        (("decode", "--family", "nothing"), "no family 'nothing'"),
        (("hop", "--family", "{tiny}"), "has no tokenizer.json"),
        (("decode", "--against", "llama.cpp"), "needs --gguf FILE"),
        (("decode", "--against", "transformers-early-exit", "--early-exit", "7"), "layers 1 … 6"),
        (("decode", "--gguf", "x.gguf"), "--gguf requires --against llama.cpp"),
        (("prefill", "--against", "transformers", "--gguf", "x.gguf"), "--gguf requires --against llama.cpp"),
        (
            ("decode", "--against", "transformers", "--early-exit", "2"),
            "--early-exit requires --against transformers-early-",
        ),
        (("decode", "--threads", "5000"), "Invalid value for '--threads'"),
        (("prefill", "--against", "transformers-early-exit"), "valid for decode only"),
        (("prefill", "--prompt-tokens", "1000"), "the prompt is too long: it has 1000 tokens"),
        (("wan", "--policy", "none.yaml"), "none.yaml: no such policy file"),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    run: Command, spoken: Path, tiny: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    bench, *given = (a.format(tiny=tiny) for a in arguments)
    family = [] if "--family" in given else ["--family", str(spoken)]
    code, out, err = run("bench", bench, *family, "--threads", "1", "--out", str(tmp_path), *given)
    shown = " ".join(err.replace("│", " ").split())
    assert code == 2 and out == "" and message in shown and "Traceback" not in err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("llama_cpp", ("--against", "llama.cpp", "--gguf", "x.gguf")), ("matplotlib", ())],
)
def test_a_missing_extra_is_named(
    run: Command, spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    sizes = ("--threads", "1", "--out", str(tmp_path))
    code, out, err = run("bench", "decode", "--family", str(spoken), *sizes, *arguments)
    assert code == 2 and out == "" and "pip install 'ruyi-flow[bench]'" in err and err.count("\n") == 1


def test_a_broken_gguf_file_is_refused(run: Command, spoken: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "bad.gguf").write_bytes(b"GGUFxxxx")
    for name, message in (("bad.gguf", "llama.cpp cannot run this file"), ("none.gguf", "no such file")):
        against = ("--against", "llama.cpp", "--gguf", str(tmp_path / name))
        code, _, err = run(
            "bench", "decode", "--family", str(spoken), "--threads", "1", "--out", str(tmp_path), *against
        )
        assert code == 2 and message in err and err.count("\n") == 1


def test_ctrl_c_ends_a_profile_and_its_processes_quietly(tmp_path: Path) -> None:
    family = tiny_family(tmp_path / "family", max_position_embeddings=2048)
    command = [sys.executable, "-m", "ruyi_flow.cli", "profile", str(family), "--dtype", "float32", "--rounds", "1"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "profile")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, like a command in a terminal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in background
    ) as profiling:
        workers: list[psutil.Process] = []
        while not workers:
            assert profiling.poll() is None
            time.sleep(0.05)
            children = psutil.Process(profiling.pid).children()
            workers = [child for child in children if "--multiprocessing-fork" in child.cmdline()]
        os.killpg(profiling.pid, signal.SIGINT)
        output, _ = profiling.communicate(timeout=60)
    assert (profiling.returncode, output) == (130, "interrupted\n")
    assert psutil.wait_procs(workers, timeout=10)[1] == []
