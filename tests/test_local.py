"""A whole family in one process: what it refuses, and that callers do not get in each other's way."""

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import ConfigError, ContextLengthError, RequestError
from ruyi_flow.local import Family, load_family
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.testing import cluster, cut_topology, tiny_family
from ruyi_flow.types import FinishReason


@pytest.fixture(scope="module")
def family(tiny: Path) -> Family:
    return load_family(tiny, dtype="float32")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], "input_ids is a list; it must be a tensor"),
        (torch.tensor([1, 2]), r"has shape \(2,\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"has shape \(0, 3\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"has shape \(1, 0\)"),
        (torch.ones(1, 3), "whole numbers"),
        (torch.tensor([[1, -1]]), "token ids must be 0"),
        (torch.tensor([[1, 10**6]]), "token ids must be 0"),
    ],
)
def test_ids_that_cannot_be_are_refused(family: Family, ids: Any, message: str) -> None:
    for ask in (family.logits, family.generate):
        with pytest.raises(RequestError, match=message):
            ask(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast'; known: fixed"),
        ({"exit": 3}, "exit 3 is not one"),
        ({"tempreature": 1.0}, "unknown option 'tempreature'; did you mean 'temperature'"),
        ({"stop": "x"}, "stop strings need text"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"raw": True}, "raw is not an option of Family.generate"),
        ({"timeout_s": 3}, "unknown option 'timeout_s'"),
        ({"exit": True}, "exit True is not one"),
        ({"family": "0123"}, "the policy was calibrated for family 0123; this family is"),
    ],
)
def test_options_that_cannot_be_are_refused(family: Family, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        family.generate(torch.tensor([[1, 2]]), **options)


def test_a_family_says_what_it_is(family: Family, tiny: Path) -> None:
    size = family.model.num_parameters() / 1e6
    assert repr(family) == f"Family({tiny.name}: exits 2, 4, 6; {size:.1f}M parameters, float32 on cpu)"


def test_what_cannot_be_loaded_is_said(tiny: Path) -> None:
    with pytest.raises(RequestError, match="exits is 5"):
        load_family(tiny, exits=5)  # type: ignore[arg-type]
    for device in ("nonsense", "meta"):
        with pytest.raises(ConfigError, match=f"device: '{device}' cannot be used here"):
            load_family(tiny, device=device)


def test_no_end_tokens_means_the_familys_own(family: Family) -> None:
    ids = torch.tensor([[5, 6, 7]])
    given = family.generate(ids, max_new_tokens=8, min_new_tokens=0)
    assert torch.equal(family.generate(ids, max_new_tokens=8, min_new_tokens=0, eos_token_ids=None), given)


def test_a_session_that_cannot_be_made_leaves_its_place_free(family: Family) -> None:
    ids = torch.tensor([[5, 6, 7]])
    probes = Scale(Score.PROBE, {2: Curve(1.0, (0.5,), (0.5,))})
    for _ in range(2):
        with pytest.raises(RequestError, match="probe"):
            family.generate(ids, max_new_tokens=2, mode="exact", scale=probes)
    assert len(family.generate(ids, max_new_tokens=2)[0]) == 2


def test_threads_may_share_a_family(family: Family) -> None:
    prompts = [torch.tensor([[3 + i, 7, 11 + i]]) for i in range(6)]
    alone = [family.generate(p, max_new_tokens=12) for p in prompts]
    together: list[torch.Tensor | None] = [None] * len(prompts)

    def ask(i: int) -> None:
        together[i] = family.generate(prompts[i], max_new_tokens=12)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(b is not None and torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_prompt_that_fills_the_context_is_refused(family: Family) -> None:
    full = torch.full((1, family.config.max_positions), 5)
    with pytest.raises(ContextLengthError, match="leaves no room in the family's context of 512"):
        family.generate(full)
    assert family.generate(full[:, :-3], max_new_tokens=9, eos_token_ids=()).shape == (1, 3)


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose own end tokens occur in its answers, some in config.json and some in generation_config.json."""
    folder = tiny_family(tmp_path_factory.mktemp("ending") / "family", eos_token_id=[17, 31])
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 44]}')
    return folder


PROMPTS = ([5, 6, 7], [9, 40, 2, 11], [30, 1])
SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 24},
    {"temperature": 1.0, "seed": 7, "max_new_tokens": 24},
    {"temperature": 1.3, "seed": 2**62, "top_k": 20, "top_p": 0.9, "max_new_tokens": 24},
    {"temperature": 0.7, "seed": 0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "max_new_tokens": 24},
    {"temperature": 1.0, "seed": 1, "min_new_tokens": 12, "max_new_tokens": 24},
    {"temperature": 1.0, "seed": 1, "eos_token_ids": (), "max_new_tokens": 24},
    {"temperature": 1.0, "seed": 1, "eos_token_ids": (50, 51, 52), "max_new_tokens": 24},
    {"temperature": 1.0, "seed": 3, "mode": "token", "threshold": 0.1, "max_new_tokens": 24},
    {
        "temperature": 1.0,
        "seed": 3,
        "mode": "cascade",
        "thresholds": {2: 0.2, 4: 0.1},
        "window": 3,
        "max_new_tokens": 24,
    },
    {"temperature": 1.0, "seed": 3, "exit": 4, "max_new_tokens": 24},
    {"seed": 3, "threshold": 0.1, "draft": 3, "max_new_tokens": 24},
]


async def test_a_family_in_one_process_answers_as_its_nodes(ending: Path) -> None:
    """The same tokens for the same options, whatever is left to defaults and wherever an answer ends."""
    family, ended = load_family(ending, dtype="float32"), 0
    async with cluster(cut_topology(ending, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        for options in SETTINGS:
            for prompt in PROMPTS:
                expected = await client.generate(prompt, **options)
                got = family.generate(torch.tensor([prompt]), **options)[0].tolist()
                assert got == expected.token_ids, options
                ended += expected.finish_reason is FinishReason.EOS
    assert len(PROMPTS) < ended < len(PROMPTS) * len(SETTINGS)


def test_a_row_of_a_batch_is_what_it_is_alone(ending: Path) -> None:
    family = load_family(ending, dtype="float32")
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_new_tokens": 40}
    rows = [[5, 6, 7], [9, 40, 2], [30, 1, 1], [5, 6, 7]]
    alone = [family.generate(torch.tensor([row]), **options)[0].tolist() for row in rows]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        together = family.generate(torch.tensor([rows[i] for i in order]), **options).tolist()
        for i, answer in zip(order, together, strict=True):
            assert answer == alone[i] + alone[i][-1:] * (len(answer) - len(alone[i]))
    assert len({len(answer) for answer in alone}) > 1


def test_every_answer_without_a_seed_is_a_new_one(family: Family) -> None:
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 20, "eos_token_ids": ()}
    answers = [answer for _ in range(2) for answer in family.generate(ids, **options).tolist()]
    assert all(a != b for a, b in itertools.combinations(answers, 2))
