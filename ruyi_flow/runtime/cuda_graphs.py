"""Short steps, padded to shapes that repeat; on CUDA each shape is captured and replayed (docs/design/0003-cuda.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ruyi_flow.family.transformer import Attention, FamilySlice
from ruyi_flow.loop.pages import PAGE_SIZE
from ruyi_flow.loop.session import Piece
from ruyi_flow.runtime.attention import LONG_PAGE, PagedAttention, page_table

__all__ = ["MAX_ROWS", "Graphs", "padded_positions", "padded_rows", "plan"]

MAX_ROWS = 64
"""Most rows of a padded step; a longer step is mostly prefill, which is faster as blocks."""

_MAX_GATHERED = 65_536
"""Most rows times positions whose KV cache may be copied in a step, where no kernel reads pages in place."""

logger = logging.getLogger(__name__)

_Compute = Callable[[Tensor, tuple[Tensor, Tensor], Attention], tuple[Tensor, ...]]


def padded_rows(rows: int) -> int:
    """Return the number of rows of the padded step: the next power of two."""
    return 1 << (rows - 1).bit_length()


def padded_positions(positions: int) -> int:
    """Return the positions that page tables cover for a longest session: long pages in a power of two."""
    return LONG_PAGE << (-(-positions // LONG_PAGE) - 1).bit_length()


def plan(blocks: Sequence[Piece], rows: int, positions: int, num_pages: int) -> list[int]:
    """List the integers that a padded step's kernels need.

    Args:
        blocks: the step's blocks.
        rows: rows of the padded step. Padding rows are written to the long page after the pool and attend to it only.
        positions: positions that each page table covers.
        num_pages: pages of the pool.

    Returns:
        For each row the position of the memory to which it is written, then for each row the number of positions it
        attends to, then for each row its `page_table` of positions / LONG_PAGE pages.
    """
    at: list[int] = []
    lengths: list[int] = []
    tables: list[int] = []
    for block in blocks:
        first, stop = block.pages.positions.start, block.start + block.count
        at += range(first + block.start, first + stop)
        lengths += range(block.start + 1, stop + 1)
        tables += block.count * page_table(block.pages.first, positions, num_pages)
    padding = rows - len(at)
    at += padding * [num_pages * PAGE_SIZE]
    lengths += padding * [1]
    tables += padding * page_table(num_pages, positions, num_pages)
    return at + lengths + tables


class Graphs:
    """Runs a shard's short steps, one captured graph for each shape.

    Without CUDA the padded steps run without graphs, so that tests cover everything else on a CPU.

    Args:
        model: the shard's stages.
        memory: (slots, 2, kv_heads, positions, head_dim) KV cache of the shard, plus LONG_PAGE positions of padding.
        num_pages: pages of the pool.
        flash: the flash-attn module, or None.
    """

    def __init__(self, model: FamilySlice, memory: Tensor, num_pages: int, flash: Any) -> None:
        self._model, self._memory, self._num_pages, self._flash = model, memory, num_pages, flash
        self._steps: dict[tuple[str, int, int, int], _Step] = {}
        self.captures = memory.is_cuda
        """Whether steps are captured; set to false when a capture fails."""
        if self.captures:
            self._stream = torch.cuda.Stream(memory.device)
            self._pool = torch.cuda.graph_pool_handle()

    @property
    def num_captured(self) -> int:
        """Number of captured graphs."""
        return sum(step.graph is not None for step in self._steps.values())

    def accepts(self, blocks: Sequence[Piece]) -> bool:
        """Whether a step of these blocks is short enough to run padded."""
        rows = sum(block.count for block in blocks)
        if rows > MAX_ROWS:
            return False
        return self._flash is not None or padded_rows(rows) * _covered(blocks) <= _MAX_GATHERED

    def trunk(self, stage: int, blocks: Sequence[Piece], states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Run a stage's trunk layers.

        Args:
            stage: index of the stage in the shard.
            blocks: the step's blocks, n rows in all.
            states: (n, hidden) states that enter the stage.
            rope: cosines and sines of the n positions.

        Returns:
            (n, hidden) boundary states at the stage's exit.
        """
        model = self._model
        first_layer, exit = model.stages[stage]

        def compute(x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> tuple[Tensor]:
            return (model.run(x, first_layer, exit, rope=rope, attention=attention),)

        (boundary,) = self._run("trunk", exit, compute, blocks=blocks, states=states, rope=rope)
        return boundary

    def branch(
        self, exit: int, blocks: Sequence[Piece], boundary: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the branch at an exit on n rows of (n, hidden) boundary states.

        Returns:
            (n, hidden) input of the LM head, and (n, vocab) logits.
        """
        model = self._model

        def compute(x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> tuple[Tensor, Tensor]:
            head_input = model.branch_states(exit, x, rope=rope, attention=attention)
            assert head_input is not None
            return head_input, model.head_at[exit].run(head_input)

        head_input, logits = self._run("branch", exit, compute, blocks=blocks, states=boundary, rope=rope)
        return head_input, logits

    def _run(
        self,
        part: str,
        exit: int,
        compute: _Compute,
        *,
        blocks: Sequence[Piece],
        states: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> list[Tensor]:
        n = states.shape[0]
        rows, positions = padded_rows(n), _covered(blocks)
        key = part, exit, rows, positions
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _Step(compute, states, rope, rows=rows, positions=positions)
        step.fill(states, rope, plan(blocks, rows, positions, self._num_pages))
        if step.graph is not None:
            step.graph.replay()
            outputs = step.outputs
        else:
            outputs = step.run(self._memory, self._flash)
            if self.captures:
                self._capture(step)
        return [out[:n].clone() for out in outputs]  # the next step of this shape overwrites them

    def _capture(self, step: _Step) -> None:
        """Capture a step that has run once, so that its libraries are loaded and its kernels compiled."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._memory.device),
                # Meanwhile the event loop's thread copies messages into device memory.
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                step.outputs = step.run(self._memory, self._flash)
        except RuntimeError as error:
            self.captures = False
            logger.warning("CUDA graphs are off because a step could not be captured: %s", str(error).splitlines()[0])
        else:
            step.graph = graph


class _Step:
    """A shape of step: its inputs at fixed addresses and, once captured, its graph and outputs."""

    def __init__(
        self, compute: _Compute, states: Tensor, rope: tuple[Tensor, Tensor], *, rows: int, positions: int
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
        """Copy a step's rows to the inputs; the padding keeps old values, whose results are discarded."""
        n = states.shape[0]
        for target, source in zip((self._states, self._cos, self._sin), (states, *rope), strict=True):
            target[:n].copy_(source)
        self._plan.copy_(torch.tensor(plan, dtype=torch.int32))

    def run(self, memory: Tensor, flash: Any) -> tuple[Tensor, ...]:
        """Compute the outputs from the inputs."""
        attention = PagedAttention(memory, self._at, self._lengths, self._tables, flash=flash)
        return self._compute(self._states, (self._cos, self._sin), attention)


def _covered(blocks: Sequence[Piece]) -> int:
    return padded_positions(max(block.start + block.count for block in blocks))
