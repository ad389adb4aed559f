"""Short steps as padded rows, on the CPU; the tests of CUDA graphs and flash-attn need a GPU."""

import asyncio
import itertools
import random
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.loading import load_slice
from ruyi_flow.loop.pages import PAGE_SIZE, PagePool, PageRun
from ruyi_flow.loop.session import Piece
from ruyi_flow.requests import SamplingParams
from ruyi_flow.runtime.attention import (
    LONG_PAGE,
    BatchedAttention,
    CachedAttention,
    PagedAttention,
    flash_attention,
    long_pages,
    page_table,
)
from ruyi_flow.runtime.cuda_graphs import MAX_ROWS, padded_positions, padded_rows, plan
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.runtime.worker import ThreadWorker
from ruyi_flow.testing import open_session
from tests.runtime.test_stage import Pipeline
from tests.runtime.test_worker import POLICY, decoding

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def rows(pages: PageRun, start: int, count: int) -> Piece:
    """Return a piece that has the attributes that a plan reads, and no others."""
    piece = Piece.__new__(Piece)
    piece.pages, piece.start, piece.count = pages, start, count
    return piece


def test_steps_are_padded_to_powers_of_two() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 4, 5, 16, 17, MAX_ROWS)] == [1, 2, 4, 4, 8, 16, 32, 64]
    assert [padded_positions(n) for n in (1, 256, 257, 512, 513, 5000)] == [256, 256, 512, 512, 1024, 8192]


def test_a_plan_places_every_row_and_keeps_the_padding_outside_the_pool() -> None:
    num_pages, pages = 20, 2
    blocks = [rows(PageRun(0, 3, 5), 300, 2), rows(PageRun(1, 18, 2), 0, 1)]
    numbers = plan(blocks, 4, pages * LONG_PAGE, num_pages)
    at, lengths, tables = numbers[:4], numbers[4:8], numbers[8:]
    assert at == [3 * PAGE_SIZE + 300, 3 * PAGE_SIZE + 301, 18 * PAGE_SIZE, num_pages * PAGE_SIZE]
    assert lengths == [301, 302, 1, 1]
    assert tables == [3, 7, 3, 7, 18, 20, 20, 20]


@pytest.mark.parametrize("seed", range(5))
def test_a_page_table_covers_a_run_of_pages_without_copies(seed: int) -> None:
    rng, num_pages = random.Random(seed), 40
    pool, memory = PagePool(num_pages * PAGE_SIZE), torch.arange(2 * (num_pages * PAGE_SIZE + LONG_PAGE) * 3)
    memory = memory.view(2, -1, 3)
    pages = long_pages(memory)
    assert pages.data_ptr() == memory.data_ptr(), "a view"
    assert pages.shape == (num_pages + 1, LONG_PAGE, 2, 3) and pages.stride(-1) == 1
    for owner in range(6):
        run, _ = pool.allocate(owner, rng.randint(1, 6 * PAGE_SIZE))
        length = run.count * PAGE_SIZE
        table = page_table(run.first, padded_positions(length), num_pages)
        found = pages[torch.tensor(table)].flatten(0, 1)[:length]
        assert torch.equal(found, memory[:, run.positions].transpose(0, 1))


def filled_memory(blocks: Sequence[Piece], num_pages: int, heads: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Return (2, 2, heads, positions, 16) memory: random numbers before the blocks' rows, NaN elsewhere."""
    torch.manual_seed(0)
    memory = torch.full((2, 2, heads, num_pages * PAGE_SIZE + LONG_PAGE, 16), torch.nan, device=device, dtype=dtype)
    for block in blocks:
        past = memory[:, :, :, block.pages.positions][:, :, :, : block.start]
        past.copy_(torch.randn_like(past))
    return memory


def check_paged(device: str, dtype: torch.dtype, within: float) -> None:
    """Check that padded rows give the same as each session's block, despite padding and unwritten pages."""
    num_pages, heads, kv_heads, d = 24, 6, 2, 16
    blocks = [
        rows(PageRun(0, 2, 3), 150, 3),
        rows(PageRun(1, 5, 1), 0, 1),
        rows(PageRun(2, 7, 10), 299, 1),
        rows(PageRun(3, 23, 1), 9, 5),
    ]
    memory, n = filled_memory(blocks, num_pages, kv_heads, device, dtype), 10
    q, k, v = (torch.randn(n, h, d, device=device, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    ours = memory.clone()
    numbers = torch.tensor(plan(blocks, 16, 512, num_pages), dtype=torch.int32, device=device)
    at, lengths, tables = numbers.split((16, 16, 32))
    flash = flash_attention(torch.device(device), dtype, d)
    padded = [torch.cat([t, torch.full_like(t[:6], torch.nan)]) for t in (q, k, v)]
    attention = PagedAttention(ours, at, lengths, tables.view(16, 2), flash=flash)
    found = attention(1, padded[0], padded[1], padded[2], None)[:n]
    each = [CachedAttention(memory[:, :, :, b.pages.positions], b.start, b.count) for b in blocks]
    expected = BatchedAttention(each, memory, at[:n].long())(1, q, k, v, None)
    assert found.isfinite().all() and (found - expected).abs().max() <= within
    pool = slice(0, num_pages * PAGE_SIZE)
    assert torch.equal(ours[:, :, :, pool].nan_to_num(7), memory[:, :, :, pool].nan_to_num(7)), (
        "both write the same to the KV cache"
    )


def test_padded_rows_give_the_same_as_blocks() -> None:
    check_paged("cpu", torch.float32, 1e-5)


@pytest.mark.cuda
@on_cuda
def test_padded_rows_give_the_same_as_blocks_on_cuda() -> None:
    check_paged("cuda", torch.float32, 1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_paged_flash_attn_gives_the_same_as_sdpa(dtype: torch.dtype) -> None:
    assert flash_attention(torch.device("cuda"), dtype, 16) is not None, "flash-attn is installed but cannot be loaded"
    check_paged("cuda", dtype, 2e-2)


@pytest.mark.parametrize(
    ("source", "capability", "head_dim", "message"),
    [
        ("", (8, 0), 256, None),
        ("", (7, 5), 64, "it needs compute capability 8.0, cuda has 7.5"),
        ("", (9, 0), 288, "it supports heads of up to 256 values, the family's have 288"),
        ("import flash_attn_2_cuda_that_is_not_there", (8, 0), 64, "it cannot be loaded: No module named"),
        ("raise OSError('libcudart.so.11.0: no such file')", (8, 0), 64, "it cannot be loaded: libcudart"),
    ],
)
def test_flash_attn_that_cannot_run_is_not_used_and_the_log_gives_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    source: str,
    capability: tuple[int, int],
    head_dim: int,
    message: str | None,
) -> None:
    (tmp_path / "flash_attn.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = flash_attention(torch.device("cuda"), torch.bfloat16, head_dim)
    sys.modules.pop("flash_attn", None)
    if message is None:
        assert found.__name__ == "flash_attn" and not caplog.records
    else:
        assert found is None and len(caplog.records) == 1 and message in caplog.text


PROMPTS = [torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 300, 5, 90, 7)]


async def answer_at_once(shard: Shard) -> list[list[tuple[int, float]]]:
    """Return the tokens and confidences of several concurrent sessions."""
    worker = ThreadWorker(1, budget=128)
    sessions = [
        open_session(shard, POLICY, SamplingParams(), prompt_length=len(prompt), max_positions=400)
        for prompt in PROMPTS
    ]
    tasks = (worker.run(decoding(session, prompt, 8)) for session, prompt in zip(sessions, PROMPTS, strict=True))
    found = [answer for answer, _, _ in await asyncio.gather(*tasks)]
    for session in sessions:
        session.close()
    await asyncio.to_thread(worker.shutdown)
    shard.capacity.check_integrity()
    return found


def shard(folder: Path, device: str, *, paged: bool, dtype: torch.dtype = torch.float32) -> Shard:
    model = load_slice(Checkpoint(folder), (2, 4, 6), dtype=dtype, device=device)
    return Shard(model, max_positions=4096, max_sessions=16, paged=paged)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, on_cuda])])
async def test_padded_steps_give_the_same_answers(tiny: Path, device: str) -> None:
    expected = await answer_at_once(shard(tiny, "cpu", paged=False))
    ours = shard(tiny, device, paged=True)
    for _ in range(2):  # on CUDA the second run replays graphs
        found = await answer_at_once(ours)
        assert [[token for token, _ in answer] for answer in found] == [
            [token for token, _ in answer] for answer in expected
        ]
        for (_, one), (_, other) in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert abs(one - other) < 1e-4
    assert ours.graphs is not None and (ours.graphs.num_captured > 0) == (device == "cuda")


def test_a_steps_states_survive_the_next_step_of_the_same_shape(tiny: Path) -> None:
    ours, plain = Pipeline([shard(tiny, "cpu", paged=True)]), Pipeline([shard(tiny, "cpu", paged=False)])
    for pipeline in (ours, plain):
        for position, token in enumerate((5, 17, 40, 11)):  # four steps of one shape, whose states are kept
            pipeline.feed([token], [position])
        pipeline.escalate(1, 4, [0, 3])
    for depth, position in itertools.product((0, 1), (0, 3)):
        assert (ours.logits(depth)[position] - plain.logits(depth)[position]).abs().max() < 1e-5


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_graph_gives_the_same_as_the_step_without_a_graph(tiny: Path, dtype: torch.dtype) -> None:
    with_graphs, without = (shard(tiny, "cuda", paged=True, dtype=dtype) for _ in range(2))
    assert with_graphs.graphs is not None and without.graphs is not None
    without.graphs.captures = False
    pipelines = [Pipeline([piece]) for piece in (with_graphs, without)]
    for pipeline in pipelines:
        for position in range(300):  # past the first long page, too
            pipeline.feed([3 + position % 50], [position])
    for position in range(300):
        one, other = (pipeline.logits(0)[position] for pipeline in pipelines)
        assert (one - other).abs().max() < (1e-4 if dtype is torch.float32 else 5e-2)
    assert with_graphs.graphs.num_captured == 4 and without.graphs.num_captured == 0, (
        "trunk and branch, for one and for two long pages"
    )
