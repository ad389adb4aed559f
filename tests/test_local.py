"""A whole family in one process: what it refuses, and that callers do not get in each other's way."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.local import Family, load_family
from ruyi_flow.routing.confidence import Curve, Scale, Score


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
    ],
)
def test_options_that_cannot_be_are_refused(family: Family, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        family.generate(torch.tensor([[1, 2]]), **options)


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
            family.generate(ids, max_new_tokens=2, scale=probes)
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
