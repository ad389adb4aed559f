"""A whole family in one process, without event loop or network: the oracle for every distributed run."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, convert_gguf, parse_dtype
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.loading import load_slice
from ruyi_flow.loop.chain import Chain, Round, decode
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.runtime.worker import InlineWorker
from ruyi_flow.serving.answering import end_tokens, load_tokenizer
from ruyi_flow.serving.engine import find_device
from ruyi_flow.types import Mode, SamplingParams, Weights, is_token_id, parse_mode

__all__ = ["Family", "load_family"]


class Family:
    """A whole family.

    Args:
        checkpoint: opened, with all its stages.
        dtype: number format.
        device: a torch device.
        weights: how products hold their weights; None keeps them as they are.
        compile: run the trunk's layers through `torch.compile`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        weights: Weights | None = None,
        compile: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.config: FamilyConfig = checkpoint.config
        self.exits = checkpoint.config.exits
        self.weights = checkpoint.weights or weights
        found = find_device(device, "device")
        self.model = load_slice(checkpoint, self.exits, dtype=dtype, device=found, weights=weights, compiled=compile)
        if compile:
            try:
                self.model.compile_layers()
            except ConfigError as error:
                raise ConfigError(f"compile: {error}") from None
        self.tokenizer: Any = load_tokenizer(checkpoint)
        """transformers' tokenizer, or None where the folder has no tokenizer.json."""
        self._shard: Shard | None = None
        self._lock = threading.Lock()  # one row after the other, whoever asks

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, exit: int | None = None) -> Tensor:
        """Whole sequences, every token at one exit, without a cache.

        Args:
            input_ids: (batch, n) token ids.
            exit: the exit; the last one when left out.

        Returns:
            (batch, n, vocab) float32

        Raises:
            RequestError: an exit that the family does not have, or ids of another shape.
        """
        exit = self._exit(exit)
        ids = self._ids(input_ids).to(self.model.device)
        return self.model.logits(ids, exit)

    def generate(
        self,
        input_ids: Tensor,
        exit: int | None = None,
        max_new_tokens: int = 128,
        min_new_tokens: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue sequences, greedily by default, each row as the loop decides it in one process.

        Args:
            input_ids: (batch, n) token ids, without padding.
            exit: the exit that decides every token; the last one when left out.
            max_new_tokens: at most this many.
            min_new_tokens: no end of sequence before this many. None lets a row end at any time when the family says
                how its answers end (generation_config.json); a bare checkpoint has no such file, and its rows get
                exactly `max_new_tokens`.
            options: other fields of `SamplingParams` (temperature, top_k, …) and of `Routing` (mode, threshold,
                draft, window, back, start, scale); no drafts by default.

        Returns:
            (batch, new) token ids; a row that ended earlier is filled up with the token that ended it.

        Raises:
            RequestError: an option or an exit that cannot be.
        """
        ids = self._ids(input_ids)
        routing_options: dict[str, Any] = {
            k: options.pop(k)
            for k in ("mode", "threshold", "thresholds", "draft", "window", "back", "start", "scale")
            if k in options
        }
        mode = parse_mode(routing_options.pop("mode", Mode.FIXED))
        chosen = self._exit(exit) if mode is Mode.FIXED else exit
        policy = Policy.resolve(Routing(**({"draft": 0} | routing_options), mode=mode, exit=chosen), self.exits)
        if min_new_tokens is None:
            min_new_tokens = 0 if (self.checkpoint.folder / "generation_config.json").exists() else max_new_tokens
        if options.get("eos_token_ids") is None:
            options["eos_token_ids"] = end_tokens(self.checkpoint, self.tokenizer)
        options.setdefault("seed", 0)
        try:
            params = SamplingParams(**options, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
        except TypeError as error:
            raise RequestError(str(error).replace("SamplingParams.__init__() got an", "generate got an")) from None
        if params.stop:
            raise RequestError("stop strings are for text: use Client; here, give eos_token_ids")
        with self._lock:
            rows = [_run_inline(self._row(row, policy, params)) for row in ids.tolist()]
        width = max(map(len, rows))
        return torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])

    async def _row(self, prompt: Sequence[int], policy: Policy, params: SamplingParams) -> list[int]:
        size = len(prompt) + params.max_new_tokens
        if self._shard is None or self._shard.pool.num_positions < size:
            self._shard = Shard(self.model, max_positions=max(2048, size), max_sessions=1)
        chain = Chain(self._shard.open(policy, params, len(prompt), size), InlineWorker(), "local")
        try:
            return [
                d.token
                for settled in await _collect(decode(chain, prompt, params.max_new_tokens))
                for d in settled.decisions
            ]
        finally:
            await chain.close()

    def _ids(self, input_ids: Tensor) -> Tensor:
        """Checked token ids."""
        if not isinstance(input_ids, Tensor):
            raise RequestError(f"input_ids is a {type(input_ids).__name__}; it must be a tensor: torch.tensor([[…]])")
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise RequestError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, n), each 1 or more")
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype is torch.bool:
            raise RequestError(f"input_ids has dtype {input_ids.dtype}; it must be whole numbers")
        if input_ids.min() < 0 or input_ids.max() >= self.config.vocab_size:
            raise RequestError(f"token ids must be 0 … {self.config.vocab_size - 1}")
        return input_ids

    def _exit(self, exit: int | None) -> int:
        chosen = self.exits[-1] if exit is None else exit
        if chosen not in self.exits:
            raise RequestError(f"exit {chosen} is not one of the family's exits {list(self.exits)}")
        return chosen


def load_family(
    path_or_name: str | Path,
    *,
    dtype: str | torch.dtype = "bfloat16",
    exits: Sequence[int] | None = None,
    device: str = "cpu",
    weights: str | Weights | None = None,
    compile: bool = False,
) -> Family:
    """Load a whole family into this process.

    Args:
        path_or_name: a folder, a GGUF file, or a name in the local store.
        dtype: float32, bfloat16 or float16.
        exits: exits to give to an ordinary Hugging Face or GGUF checkpoint; its branches are then untrained copies.
        device: a torch device.
        weights: "int8" or "int4" holds the weights of products in few bits; "bf16", or None, as they are.
        compile: run the trunk's layers through `torch.compile`, which takes a while here; on a CPU it does not pay.

    Raises:
        CheckpointError: what is wrong with the files.
        ConfigError: a device that is not there, or nothing to compile with.
    """
    chosen = parse_dtype(dtype)
    if weights is not None and weights not in tuple(Weights):
        raise RequestError(f"weights is {weights!r}; known: {', '.join(Weights)}")
    held = None if weights is None else Weights(weights)
    if exits is not None and not (isinstance(exits, Sequence) and all(map(is_token_id, exits))):
        raise RequestError(f"exits is {exits!r}; it must be whole numbers, as in [5, 11]")
    how: dict[str, Any] = {"dtype": chosen, "device": device, "weights": held, "compile": compile}
    if str(path_or_name).endswith(".gguf"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "converted"
            convert_gguf(path_or_name, folder)
            return Family(Checkpoint(folder, exits), **how)
    return Family(Checkpoint(store.locate(path_or_name), exits), **how)


async def _collect(rounds: AsyncIterator[Round]) -> list[Round]:
    return [settled async for settled in rounds]


def _run_inline(coroutine: Any) -> Any:
    """Run a coroutine that never waits, since all of its stages are in this process."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a stage in this process waited")
