"""The steps of `tests.bench.gpu`, which runs each in a process of its own.

    python -m tests.bench.gpu_steps STEP FOLDER DEVICE SIZES

A step prints its figures as one line of JSON and exits with 0, or prints an `error` beside them and exits with 1.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from ruyi_flow.bench import Against, engines, in_process, serving
from ruyi_flow.bench.measurement import Measurement, Setup, describe_machine, interleaved
from ruyi_flow.bench.nodes import PROMPT, PROMPTS, generate_exactly, running_nodes, tokenize_prompts
from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.local import Family, load_family
from ruyi_flow.testing import tiny_family
from ruyi_flow.types import Weights
from tests.families import MIN_VOCAB, add_tokenizer

SMOLLM2 = {
    "base": "llama",
    "exits": (5, 11, 17, 23, 29),
    "early_exit_branch_layers": [1, 2, 2, 2, 1],
    "tied": True,
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
RUYI_7B = {
    "base": "qwen2",
    "exits": (27,),
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
}


@dataclass(frozen=True)
class Sizes:
    """How much the steps compute. Families that are named here have random weights."""

    _: KW_ONLY
    demo: Mapping[str, Any]
    """Geometry that stands in for the demo family where the store does not have it."""
    ruyi: Mapping[str, Any]
    from_store: bool
    """Whether the demo family is taken from the store where it is there."""
    tokens: int
    """New tokens of each answer."""
    prompt_tokens: int
    sessions: int
    rounds: int
    copied_bytes: int
    disk_gb: int
    """Disk space of the largest family."""
    product_size: int
    """Rows and columns of the matrices whose product measures the arithmetic."""


SIZES = {
    "full": Sizes(
        demo=SMOLLM2,
        ruyi=RUYI_7B,
        from_store=True,
        tokens=64,
        prompt_tokens=512,
        sessions=64,
        rounds=3,
        copied_bytes=1 << 30,
        disk_gb=17,
        product_size=8192,
    ),
    "small": Sizes(
        demo={"base": "llama", "exits": (2, 4, 6), "tied": True, "vocab_size": MIN_VOCAB},
        ruyi={"base": "qwen2", "exits": (3,), "vocab_size": MIN_VOCAB},
        from_store=False,
        tokens=4,
        prompt_tokens=70,
        sessions=3,
        rounds=1,
        copied_bytes=1 << 20,
        disk_gb=0,
        product_size=128,
    ),
}


@dataclass(frozen=True)
class Place:
    """Where a step runs."""

    folder: Path
    """Temporary folder of the families, which all steps share."""
    device: str
    sizes: Sizes

    def family(self, name: str) -> Path:
        """Return the folder of the family `demo` or `ruyi`."""
        if name == "demo" and self.sizes.from_store and store.DEMO in store.names():
            return store.locate(store.DEMO)
        return self.folder / name

    def setup(self, name: str) -> Setup:
        """Return the settings of a benchmark of a family in bfloat16."""
        sizes = self.sizes
        threads = 2 if sizes is SIZES["full"] else 1
        family = str(self.family(name))
        return Setup(family, tokens=sizes.tokens, rounds=sizes.rounds, threads=threads, device=self.device)

    def median_s(self, run: Callable[[], object]) -> float:
        """Return the median seconds of ten calls that launch kernels, after three that warm up."""
        times = []
        for _ in range(13):
            began = time.perf_counter()
            run()
            if self.device.startswith("cuda"):
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - began)
        return statistics.median(times[3:])


@dataclass(frozen=True)
class Gpu:
    """What a device can do at best; measured, in bfloat16."""

    bytes_per_s: float
    """Bytes that a large copy reads and writes."""
    flops_per_s: float
    """Operations of a large matrix product."""

    @classmethod
    def measure(cls, place: Place) -> Gpu:
        """Time a copy and a product."""
        best = cls(_copied_bytes_per_s(place), _product_flops_per_s(place))
        torch.cuda.empty_cache()  # for the nodes, which are other processes; does nothing without a GPU
        return best

    def least_s(self, config: FamilyConfig, *, positions: int, sessions: int, context: float) -> float:
        """Return the seconds below which no step of the whole family at its last exit can be.

        The step reads all weights and each session's keys and values once, and computes each position.

        Args:
            config: the family's geometry.
            positions: positions that the step computes.
            sessions: sessions that they belong to; each gets the logits of one position.
            context: mean number of positions of a session's KV cache.
        """
        layers = config.num_layers
        weights = layers * config.layer_bytes(Weights.BF16) + config.head_bytes(Weights.BF16)
        read = weights + sessions * context * layers * config.kv_bytes
        flops = positions * layers * config.layer_flops(context) + sessions * config.head_flops
        return max(read / self.bytes_per_s, flops / self.flops_per_s)


def _copied_bytes_per_s(place: Place) -> float:
    source = torch.zeros(place.sizes.copied_bytes, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * place.sizes.copied_bytes / place.median_s(lambda: target.copy_(source))


def _product_flops_per_s(place: Place) -> float:
    n = place.sizes.product_size
    a, b = (torch.randn(n, n, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / place.median_s(lambda: a @ b)


def machine(place: Place) -> dict[str, Any]:
    """Describe the machine, and what its GPU can do at best."""
    found = describe_machine(place.setup("demo").threads, place.device)
    if place.device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(place.device)
        found |= {"cuda": torch.version.cuda, "capability": f"{gpu.major}.{gpu.minor}"}
        found["gpu_memory_gb"] = gpu.total_memory / 1e9
    for name in ("transformers", "flash_attn"):
        found[name] = version(name) if find_spec(name) else None
    best = Gpu.measure(place)
    return {"machine": found, "copy_gb_per_s": best.bytes_per_s / 1e9, "bf16_tflop_per_s": best.flops_per_s / 1e12}


def tests(place: Place) -> dict[str, Any]:
    """Run the tests that need a GPU; where there is none, they are skipped."""
    report = place.folder / "tests.xml"
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "pytest.mark.cuda" in path.read_text()]
    options = ["-m", "cuda", "-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *files], stdout=sys.stderr)
    if not report.exists():
        raise RuyiFlowError(f"pytest ended with status {done.returncode} before it ran a test")
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    found: dict[str, Any] = {"passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped}
    if done.returncode:
        cases = [case for suite in suites for case in suite.iter("testcase")]
        bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        found["error"] = "; ".join(f"{case.get('classname')}: {case.get('name')}" for case in bad[:10])
    return found


def write_family(name: str, place: Place) -> dict[str, Any]:
    """Write a family with random weights to the steps' folder, unless it comes from the store."""
    folder, geometry = place.family(name), dict(place.sizes.demo if name == "demo" else place.sizes.ruyi)
    if not folder.exists():
        free = shutil.disk_usage(place.folder).free
        if free < place.sizes.disk_gb * 1e9:
            raise RuyiFlowError(
                f"{place.folder}: {free / 1e9:.1f} GB are free and {place.sizes.disk_gb} are needed; "
                "set TMPDIR to a folder with more"
            )
        partial = place.folder / f"{name}.partial"
        tiny_family(partial, **geometry, dtype=torch.bfloat16, device=place.device, eos_token_id=258)
        add_tokenizer(partial).rename(folder)
    config = Checkpoint(folder).config
    weights = "random" if folder.parent == place.folder else "from the store"
    return {"weights": weights, "parameters": config.num_parameters(config.exits[-1]), "layers": config.num_layers}


def decode(name: str, place: Place) -> dict[str, Any]:
    """Measure the time per token of one session, alone, against transformers."""
    best, setup, config = Gpu.measure(place), place.setup(name), Checkpoint(place.family(name)).config
    found = in_process.decode(setup, against=[Against.TRANSFORMERS], report=say)
    prompt = len(tokenize_prompts(Checkpoint(place.family(name)), [PROMPT])[0])
    least = best.least_s(config, positions=1, sessions=1, context=prompt + setup.tokens / 2)
    return with_shares(found, 1e3 * least, "ms_per_token")


def prefill(name: str, place: Place) -> dict[str, Any]:
    """Measure the time of a prompt up to its first token, against transformers."""
    best, setup, config = Gpu.measure(place), place.setup(name), Checkpoint(place.family(name)).config
    n = place.sizes.prompt_tokens
    found = in_process.prefill(setup, prompt_tokens=n, against=[Against.TRANSFORMERS], report=say)
    return with_shares(found, 1e3 * best.least_s(config, positions=n, sessions=1, context=n / 2), "ms_per_prompt")


def with_shares(found: Measurement, least_ms: float, key: str) -> dict[str, Any]:
    """Add to each engine's row the share of its time that the device's bound would take."""
    rows = {name: row | {"share_of_bound": least_ms / row[key]} for name, row in found.results.items()}
    return {"least_ms": least_ms, **rows}


def sessions(name: str, place: Place) -> dict[str, Any]:
    """Measure many sessions at once on one node, against a batch of as many rows in transformers."""
    best, setup, count = Gpu.measure(place), place.setup(name), place.sizes.sessions
    found = asyncio.run(serving.serve(setup, sessions=count, report=say)).results
    checkpoint = Checkpoint(place.family(name))
    ids = tokenize_prompts(checkpoint, [PROMPT])[0]
    model = engines.as_transformers(checkpoint, dtype=torch.bfloat16).to(setup.device)
    engine, times = engines.transformers(model, rows=count), []
    for _, is_measured in interleaved([engine.name], setup.rounds, say):
        began = time.perf_counter()
        engine.generate(ids, setup.tokens)
        if is_measured:
            times.append(time.perf_counter() - began)
    found[engine.name] = {"tokens_per_s": count * setup.tokens / statistics.median(times)}
    found["together"]["ratio"] = found["together"]["tokens_per_s"] / found[engine.name]["tokens_per_s"]
    context = len(ids) + setup.tokens / 2
    for row, rows in (("alone", 1), ("together", count), (engine.name, count)):
        least = best.least_s(checkpoint.config, positions=rows, sessions=rows, context=context)
        found[row]["share_of_bound"] = found[row]["tokens_per_s"] * least / rows
    return {"sessions": count, **found}


VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact", "draft": 0},
    "drafts": {"mode": "exact", "draft": 4},
    "token": {"mode": "token", "threshold": 0.5, "draft": 2},
    "sampled": {"mode": "token", "threshold": 0.5, "draft": 2, "temperature": 0.8, "seed": 7},
}
"""Options of the answers that three nodes and one process must give alike."""


async def nodes(place: Place) -> dict[str, Any]:
    """Compare the answers of three node processes on one device with those of the whole family in this process.

    All is in float32, in which they are the same token for token. Some sessions run at once. Each greedy answer of the
    last exit is also read again as one sequence, without a KV cache.
    """
    folder, device, tokens = place.family("demo"), place.device, place.sizes.tokens
    family = load_family(folder, dtype="float32", device=device)
    prompts = tokenize_prompts(family.checkpoint, PROMPTS)
    cuts = [family.exits[:-2], family.exits[-2:-1], family.exits[-1:]]
    answer: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": 0, "eos_token_ids": ()}
    found: dict[str, Any] = {}
    async with running_nodes(cuts, family=str(folder), device=device, dtype="float32", encoding="f32") as client:
        for i, (name, options) in enumerate(VARIANTS.items()):
            say("comparing", i, len(VARIANTS))
            replies = await asyncio.gather(*(generate_exactly(client, ids, tokens, **options) for ids in prompts))
            equal = 0
            for ids, reply in zip(prompts, replies, strict=True):
                ours = [token.id for token in reply.tokens]
                whole = family.generate(torch.tensor([ids]), **answer, **options)[0].tolist()
                equal += ours == whole and (name != "exact" or ours == read_again(family, ids, ours))
            found[name] = {"answers": len(prompts), "equal": equal}
        engine, ids = engines.ruyi_flow(family), prompts[0]
        times: dict[str, list[float]] = {"three_nodes": [], "one_process": []}
        for name, is_measured in interleaved([*times], place.sizes.rounds, say):
            began = time.perf_counter()
            if name == "three_nodes":
                await generate_exactly(client, ids, tokens)
            else:
                engine.generate(ids, tokens)
            if is_measured:
                times[name].append(1e3 * (time.perf_counter() - began) / tokens)
        found |= {name: {"ms_per_token": statistics.median(values)} for name, values in times.items()}
    differ = [name for name in VARIANTS if found[name]["equal"] != found[name]["answers"]]
    return found | ({"error": f"answers differ in: {', '.join(differ)}"} if differ else {})


def read_again(family: Family, ids: list[int], answer: list[int]) -> list[int]:
    """Return the last exit's most probable token before each token of an answer, given those before it."""
    logits = family.logits(torch.tensor([ids + answer]))[0]
    return logits[len(ids) - 1 : -1].argmax(-1).tolist()


OF_A_FAMILY: dict[str, Callable[[str, Place], dict[str, Any]]] = {
    "family": write_family,
    "decode": decode,
    "prefill": prefill,
    "sessions": sessions,
}
STEPS: dict[str, Callable[[Place], Any]] = {
    "machine": machine,
    "tests": tests,
    "nodes": nodes,
    **{f"{name}-{step}": partial(run, name) for name in ("demo", "ruyi") for step, run in OF_A_FAMILY.items()},
}


def say(what: str, done: int, total: int) -> None:
    """Print progress on standard error."""
    print(f"  {what}: {done} of {total}", file=sys.stderr, flush=True)


def main() -> int:
    name, folder, device, sizes = sys.argv[1:]
    try:
        found = STEPS[name](Place(Path(folder), device, SIZES[sizes]))
        if asyncio.iscoroutine(found):
            found = asyncio.run(found)
    except Exception as error:  # whatever it is, it is this step's result
        traceback.print_exc()
        found = {"error": traceback.format_exception_only(error)[0].strip()}
    print(json.dumps(found))
    return int("error" in found)


if __name__ == "__main__":
    sys.exit(main())
