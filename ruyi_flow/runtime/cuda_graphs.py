"""Short steps in shapes that repeat: padded, and on CUDA captured once and then replayed (docs/design/0003-cuda.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ruyi_flow.family.transformer import Attention, FamilySlice
from ruyi_flow.loop.pages import PAGE_SIZE, PageRun
from ruyi_flow.runtime.attention import LONG_PAGE, PagedAttention, page_table

__all__ = ["MAX_ROWS", "Block", "Graphs", "padded_positions", "padded_rows", "plan"]

MAX_ROWS = 64
"""Of a step that is taken row by row; a longer one is mostly prompts, which do better as blocks."""

_MOST_GATHERED = 65_536
"""Rows times positions that are copied together at once where no kernel reads pages in place."""

logger = logging.getLogger(__name__)

_Compute = Callable[[Tensor, tuple[Tensor, Tensor], Attention], tuple[Tensor, ...]]


class Block(Protocol):
    """Consecutive rows of one session in a step."""

    @property
    def pages(self) -> PageRun:
        """The session's pages."""
        ...

    @property
    def start(self) -> int:
        """The first row's position in the session."""
        ...

    @property
    def count(self) -> int:
        """How many rows."""
        ...


def padded_rows(rows: int) -> int:
    """The size of a step that these rows are padded to: the next power of two."""
    return 1 << (rows - 1).bit_length()


def padded_positions(positions: int) -> int:
    """How far the page tables of a step reach whose longest session holds so many: a power of two of long pages."""
    return LONG_PAGE << (-(-positions // LONG_PAGE) - 1).bit_length()


def plan(blocks: Sequence[Block], rows: int, positions: int, num_pages: int) -> list[int]:
    """What a step tells its kernels, in one list: where each row is written, what it sees, and every row's page table.

    Args:
        blocks: the step's.
        rows: size of the step. Rows past the blocks' write to the long page after the pool, and see themselves.
        positions: how far each page table reaches.
        num_pages: in the pool.

    Returns:
        rows positions of the memory, rows lengths, rows * positions / LONG_PAGE long pages.
    """
    at: list[int] = []
    lengths: list[int] = []
    tables: list[int] = []
    for block in blocks:
        first, stop = block.pages.positions.start, block.start + block.count
        at += range(first + block.start, first + stop)
        lengths += range(block.start + 1, stop + 1)
        tables += block.count * page_table(block.pages.first, positions, num_pages)
    empty = rows - len(at)
    at += empty * [num_pages * PAGE_SIZE]
    lengths += empty * [1]
    tables += empty * page_table(num_pages, positions, num_pages)
    return at + lengths + tables


class Graphs:
    """A shard's short steps, by their shape.

    Off CUDA it runs the same padded steps without graphs, so that all but the graphs is tested where there is no GPU.

    Args:
        model: the shard's stages.
        memory: (slots, 2, kv_heads, positions, head_dim), the shard's pool of pages and LONG_PAGE positions more.
        num_pages: in the pool.
        flash: flash-attn, or None.
    """

    def __init__(self, model: FamilySlice, memory: Tensor, num_pages: int, flash: Any) -> None:
        self._model, self._memory, self._num_pages, self._flash = model, memory, num_pages, flash
        self._steps: dict[tuple[str, int, int, int], _Step] = {}
        self.captures = memory.is_cuda
        """Whether steps become graphs; no longer when one could not be captured."""
        if self.captures:
            self._stream = torch.cuda.Stream(memory.device)
            self._pool = torch.cuda.graph_pool_handle()

    @property
    def num_captured(self) -> int:
        """Graphs that there are."""
        return sum(step.graph is not None for step in self._steps.values())

    def take(self, blocks: Sequence[Block]) -> bool:
        """Whether a step of these blocks is one for here."""
        rows = sum(block.count for block in blocks)
        if rows > MAX_ROWS:
            return False
        return self._flash is not None or padded_rows(rows) * _reach(blocks) <= _MOST_GATHERED

    def trunk(self, stage: int, blocks: Sequence[Block], states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Run a stage's trunk layers.

        Args:
            states: (n, hidden) boundary states that enter it.
            rope: of the n positions.

        Returns:
            (n, hidden) boundary states at its exit.
        """
        model = self._model
        first_layer, exit = model.stages[stage]

        def compute(x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> tuple[Tensor]:
            return (model.run(x, first_layer, exit, rope=rope, attention=attention),)

        (boundary,) = self._run("trunk", exit, compute, blocks, states, rope)
        return boundary

    def branch(
        self, exit: int, blocks: Sequence[Block], boundary: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the branch at an exit, for every row.

        Returns:
            (n, hidden) states that its head reads, and (n, vocab) logits.
        """
        model = self._model

        def compute(x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> tuple[Tensor, Tensor]:
            read = model.branch_states(exit, x, rope=rope, attention=attention)
            assert read is not None
            return read, model.head_at[exit].run(read)

        read, logits = self._run("branch", exit, compute, blocks, boundary, rope)
        return read, logits

    def _run(
        self,
        part: str,
        exit: int,
        compute: _Compute,
        blocks: Sequence[Block],
        states: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> list[Tensor]:
        n = states.shape[0]
        rows, positions = padded_rows(n), _reach(blocks)
        key = part, exit, rows, positions
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _Step(compute, states, rope, rows, positions)
        step.fill(states, rope, plan(blocks, rows, positions, self._num_pages))
        if step.graph is not None:
            step.graph.replay()
            outputs = step.outputs
        else:
            outputs = step.run(self._memory, self._flash)
            if self.captures:
                self._capture(step)
        return [out[:n].clone() for out in outputs]  # the next step of this shape writes over them

    def _capture(self, step: _Step) -> None:
        """Record a step that has just run, so that libraries are loaded and the kernels compiled."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._memory.device),
                # The event loop's thread reads messages into device memory meanwhile.
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                step.outputs = step.run(self._memory, self._flash)
        except RuntimeError as error:
            self.captures = False
            logger.warning("CUDA graphs are off, a step could not be captured: %s", str(error).splitlines()[0])
        else:
            step.graph = graph


class _Step:
    """One shape of step: its inputs, always at the same addresses, and once captured its graph and outputs."""

    def __init__(
        self, compute: _Compute, states: Tensor, rope: tuple[Tensor, Tensor], rows: int, positions: int
    ) -> None:
        self._compute = compute
        self._states, self._cos, self._sin = (t.new_zeros(rows, *t.shape[1:]) for t in (states, *rope))
        pages = positions // LONG_PAGE
        self._plan = torch.zeros(rows * (2 + pages), dtype=torch.int32, device=states.device)
        self._at, self._lengths, tables = self._plan.split((rows, rows, rows * pages))
        self._tables = tables.view(rows, pages)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def fill(self, states: Tensor, rope: tuple[Tensor, Tensor], plan: list[int]) -> None:
        """Take in a step's own rows; what is past them is left from the last one, and nobody reads what it becomes."""
        n = states.shape[0]
        for ours, theirs in zip((self._states, self._cos, self._sin), (states, *rope), strict=True):
            ours[:n].copy_(theirs)
        self._plan.copy_(torch.tensor(plan, dtype=torch.int32))

    def run(self, memory: Tensor, flash: Any) -> tuple[Tensor, ...]:
        """Compute from the inputs as they are."""
        attention = PagedAttention(memory, self._at, self._lengths, self._tables, flash)
        return self._compute(self._states, (self._cos, self._sin), attention)


def _reach(blocks: Sequence[Block]) -> int:
    return padded_positions(max(block.start + block.count for block in blocks))
