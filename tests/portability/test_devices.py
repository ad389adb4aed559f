"""Devices that are not at hand: what is decided for them, and whether torch has their operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from ruyi_flow.errors import ConfigError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.devices import find_device, has_float64, has_int4, has_onednn, lacks_bfloat16
from ruyi_flow.family.loading import load_slice
from ruyi_flow.local import load_family
from ruyi_flow.loop.session import Pass
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.sampling import Sampler
from ruyi_flow.runtime.scores import measure, measure_all
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.testing import open_session
from ruyi_flow.types import Mode

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda", "cuda:1", "meta", "privateuseone", "vulkan", "tpu", ""])
def test_a_device_that_torch_lacks_is_refused_in_one_line_that_names_the_others(name: str) -> None:
    kind = name.partition(":")[0]
    if kind in ("mps", "xpu", "cuda") and torch.get_device_module(kind).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(ConfigError, match=rf"^a: device: '{name}' cannot be used here: .*; torch finds cpu") as error:
        find_device(name, "a: device")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_devices_of_this_machine_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpus:
        def is_available(self) -> bool:
            return True

        def device_count(self) -> int:
            return 2

    real = torch.get_device_module
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Gpus() if kind == "xpu" else real(kind))
    with pytest.raises(ConfigError, match="torch finds cpu, (cuda.*)?xpu, xpu:1"):
        find_device("tpu", "device")


def test_what_runs_on_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, mps, xpu, cuda = (torch.device(kind) for kind in ("cpu", "mps", "xpu", "cuda"))
    assert [has_float64(device) for device in (cpu, cuda, mps, xpu)] == [True, True, False, False]
    assert has_int4(cpu) and not has_int4(mps) and not has_int4(xpu)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_int4(cuda) is expected
    monkeypatch.delattr(torch, "_convert_weight_to_int4pack_for_cpu")
    assert not has_int4(cpu)
    assert not lacks_bfloat16(torch.bfloat16, mps) and not lacks_bfloat16(torch.float32, cpu)


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_onednn_counts_only_where_its_operators_run(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("could not create a primitive descriptor")

    has_onednn.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, missing, broken)
    try:
        assert not has_onednn() and lacks_bfloat16(torch.bfloat16, torch.device("cpu"))
    finally:
        has_onednn.cache_clear()


def test_noise_is_drawn_on_the_cpu_for_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Tensor] = []
    real = torch.Tensor.cpu

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor)
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", copy)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=5)
    here = Sampler(params, 3).pick(logits, [2, 3, 4, 5], [])
    assert not moved
    monkeypatch.setattr("ruyi_flow.runtime.sampling.has_float64", lambda device: False)
    assert Sampler(params, 3).pick(logits, [2, 3, 4, 5], []) == here and len(moved) == 4


class Recorder(TorchDispatchMode):
    """Records the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        overload = func._overloadname
        self.names.add(func._schema.name.removeprefix("aten::") + (f".{overload}" if overload != "default" else ""))
        return func(*args, **(kwargs or {}))


@cache
def operators() -> dict[str, tuple[set[str], str | None]]:
    """Torch's own table: the devices that implement each operator, and the operator that it is an alias of."""
    file = Path(torch.__file__).parents[1] / "torchgen/packaged/ATen/native/native_functions.yaml"
    table = {}
    for entry in yaml.load(file.read_bytes(), yaml.CSafeLoader):
        keys = ",".join(entry.get("dispatch", {"CompositeImplicitAutograd": ""})).replace(" ", "").split(",")
        table[entry["func"].partition("(")[0]] = set(keys), entry.get("structured_delegate")
    return table


def has(name: str, device: str) -> bool:
    """Whether an operator runs on a type of devices."""
    keys, delegate = operators()[name]
    general = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
    return has(delegate, device) if delegate else bool(keys & {device, *general})


def test_torch_has_every_operator_of_a_node_on_apple_gpus(five: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ruyi_flow.family.linear.has_onednn", lambda: False)
    monkeypatch.setattr("ruyi_flow.family.linear.lacks_bfloat16", lambda dtype, device: False)
    model = load_slice(Checkpoint(five), Checkpoint(five).exits, dtype=torch.bfloat16)
    shard = Shard(model, max_positions=1024, max_sessions=2)
    policy = Policy.resolve(Routing(Mode.TOKEN, threshold=0.0), shard.exits)
    sessions = [open_session(shard, policy, SamplingParams(), prompt_length=9, max_positions=64) for _ in range(2)]
    with Recorder() as seen:
        for session in sessions:
            session.token_ids.extend([7] * 9)
        shard.run([(Pass(session, 0, session.embed([7] * 9), (8,)), 9) for session in sessions])
        whole = load_family(five)
        whole.generate(IDS, max_new_tokens=5, eos_token_ids=())
        logits = torch.randn(3, 61)
        for score in (Score.MAX_PROBABILITY, Score.MARGIN, Score.NEGATIVE_ENTROPY):
            measure(logits, score, 0.5)
        measure_all(logits, list(Score), [0.5])
    assert {"index_copy_", "linear", "scaled_dot_product_attention", "topk"} <= seen.names
    assert not {name for name in seen.names if not has(name, "MPS")}
    assert has("_scaled_dot_product_attention_math_for_mps", "MPS")
