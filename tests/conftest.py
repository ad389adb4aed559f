"""Families and helpers that several tests share. Real parts throughout: tiny random families, real gRPC nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family import store
from ruyi_flow.family.transformer import CausalAttention, Rope
from ruyi_flow.local import Family, load_family
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import Policy
from ruyi_flow.testing import tiny_family

torch.set_num_threads(1)

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}|{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Ruyi family with exits 2, 4, 6."""
    return tiny_family(tmp_path_factory.mktemp("families") / "tiny")


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny family with five exits, two of whose branches are deeper than Ruyi's."""
    folder = tmp_path_factory.mktemp("families") / "five"
    ours: dict[str, Any] = {"early_exit_branch_layers": [2, 1, 3, 1, 1], "early_exit_probe_size": 5}
    return tiny_family(folder, base="qwen2", exits=(1, 3, 4, 6, 7), seed=3, **ours)


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny family whose tokenizer knows single bytes."""
    folder = tiny_family(tmp_path_factory.mktemp("spoken") / "spoken", vocab_size=261, eos_token_id=258)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(tiny: Path) -> Oracle:
    """The uncached, unsplit truth about `tiny`."""
    return Oracle(load_family(tiny, dtype="float32"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo family, fetched once into the local store."""
    try:
        return store.pull(store.DEMO)
    except CheckpointError as error:
        pytest.skip(f"the demo family is not in the store and cannot be fetched: {error}")


def confidence(family: Family, policy: Policy, exit: int, ids: list[int], logits: torch.Tensor) -> float:
    """What a branch's confidence after some tokens is by its definition."""
    curve = None if policy.scale is None else policy.scale.curves.get(exit)
    if policy.scale is None or curve is None:
        return float(logits.softmax(-1).max())
    if policy.scale.score is Score.PROBE:
        model = family.model
        cos, sin = Rope(family.config, torch.float32, torch.device("cpu")).at(0, len(ids))
        x = model.run(model.embed(torch.tensor(ids)), 0, exit, (cos, sin), CausalAttention(1))
        read, probe = model.reading(exit, x, (cos, sin), CausalAttention(1)), model.branch_at[exit].probe
        assert read is not None and probe is not None
        unit = read[-1] / (read[-1].square().mean() + 1e-7).sqrt()
        seen = torch.cat([unit, logits.log_softmax(-1).topk(8).values])
        odds = probe.down(torch.nn.functional.silu(probe.up(seen))) / curve.temperature
        return float(np.interp(float(odds.sigmoid()), curve.scores, curve.chances))
    chances = (logits / curve.temperature).softmax(-1)
    first, second = chances.topk(2).values.tolist()
    score = {
        Score.MAX_PROBABILITY: first,
        Score.MARGIN: first - second,
        Score.NEGATIVE_ENTROPY: float((chances * chances.log()).sum()),
    }[policy.scale.score]
    return float(np.interp(score, curve.scores, curve.chances))


class Oracle:
    """What the loop must amount to: whole sequences, no cache, no split, one token after the other."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def decide(
        self,
        policy: Policy,
        prompt: Sequence[int],
        count: int,
        pick: Callable[[torch.Tensor, list[int]], int] | None = None,
        eos: Sequence[int] = (),
    ) -> list[tuple[int, int]]:
        """(token, exit) of each new token: the shallowest exit that is sure, given the prefix as decided."""
        ids, decided = list(prompt), []
        for _ in range(count):
            for exit in self.family.exits:
                logits = self.family.logits(torch.tensor([ids]), exit)[0, -1]
                if policy.sure(exit, confidence(self.family, policy, exit, ids, logits)):
                    token = int(logits.argmax()) if pick is None else pick(logits, ids)
                    break
            ids.append(token)
            decided.append((token, exit))
            if token in eos:
                break
        return decided


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local store."""
    monkeypatch.setenv("RUYI_FLOW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
