"""How long a user waits when a node dies or hangs in the middle of an answer, and what a parked conversation saves."""

from __future__ import annotations

import signal
import statistics
from typing import Any

from ruyi_flow.bench.nodes import generate_exactly, running_nodes, tokenize_prompts
from ruyi_flow.bench.recovery import MOST_DEATHS, strike
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint

_CONTEXT = 256
"""Tokens of the prompt and the answer when the node is lost."""

_BEFORE, _AFTER = 40, 6
"""Tokens of the answer before the loss, and after it."""

_TURN = 2000
"""Tokens of the conversation whose second turn is measured."""


async def bench_recovery(rounds: int) -> dict[str, Any]:
    """Wait for the next token after SIGKILL and SIGSTOP of a replica, and time to first token of a second turn.

    Demo family, bfloat16, on loopback, in mode exact, with 256 tokens of context. `replay` is the time that the other
    replica computes for the same positions, and `beyond` what the wait for the next token exceeds it by.
    """
    checkpoint = Checkpoint(store.locate(store.DEMO))
    exits = checkpoint.config.exits
    cuts, limits = (exits[:2], exits[2:]), {"max_positions": 8192, "grace_s": 1}
    ids = tokenize_prompts(checkpoint, ["Write a short note to a friend who moved to another city. " * 40])[0]
    results: dict[str, Any] = {}
    prompt, replays = ids[: _CONTEXT - _BEFORE], list[float]()
    for name, sent in (("kill", signal.SIGKILL), ("hang", signal.SIGSTOP)):
        gaps, same = list[float](), 0
        async with running_nodes(cuts, replicas=2, limits=limits) as client:
            expected = (await generate_exactly(client, prompt, _BEFORE + _AFTER)).token_ids
            for _ in range(3):
                whole = await generate_exactly(client, ids[:_CONTEXT], 1)
                replays.append(next(hop.compute_s for hop in whole.stats.hops if hop.node == "n1"))
            for _ in range(min(rounds, MOST_DEATHS)):
                struck = await strike(client, prompt, sent, before=_BEFORE, after=_AFTER)
                gaps.append(struck.wait_s)
                same += list(struck.token_ids) == expected
        beyond = [gap - statistics.median(replays) for gap in gaps]
        results |= {
            f"{name}_beyond_median_s": statistics.median(beyond),
            f"{name}_beyond_worst_s": max(beyond),
            f"{name}_identical": f"{same} of {len(gaps)}",
        }
    results["replay_s"] = statistics.median(replays)
    first: dict[float, list[float]] = {0: [], 600: []}
    for park_s, found in first.items():
        async with running_nodes(cuts, replicas=2, limits={**limits, "park_s": park_s}) as client:
            for i in range(rounds):
                turn = [*ids[i : i + 3], *ids[3:_TURN]]
                reply = await generate_exactly(client, turn, 16)
                again = await generate_exactly(client, [*turn, *reply.token_ids, *ids[:12]], 2)
                found.append(again.stats.first_token_s)
    fresh, parked = (statistics.median(found) for found in first.values())
    return results | {
        "second_turn_fresh_s": fresh,
        "second_turn_parked_s": parked,
        "second_turn_ratio": parked / fresh,
        "goal": "kill <= 0.3 s, hang <= 2 s beyond the replay; second turn <= 0.15",
    }
