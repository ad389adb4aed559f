"""A whole family in one process, without event loop or network: the reference for every distributed run."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ruyi_flow.config.policy_file import with_policy_file
from ruyi_flow.errors import ConfigError, RequestError, shown
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, parse_dtype
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.devices import find_device
from ruyi_flow.family.gguf import convert_gguf
from ruyi_flow.family.loading import load_slice
from ruyi_flow.family.tokenizer import check_context, end_tokens, load_tokenizer
from ruyi_flow.loop.chain import Chain, decode
from ruyi_flow.requests import SamplingParams, SessionOpen, check_request_options, parse_request
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.runtime.worker import InlineWorker
from ruyi_flow.types import Weights, to_token_id

__all__ = ["Family", "load_family"]


class Family:
    """A whole family in this process; `load_family` makes one.

    Args:
        checkpoint: the opened checkpoint with all stages.
        dtype: number format of the layers and the KV cache.
        device: a torch device.
        weights: number format of the weight matrices. Default: as the checkpoint has them.
        compile: whether the trunk's layers run through `torch.compile`.
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
        """The transformers tokenizer, or None if the folder has no tokenizer.json."""
        self._eos_token_ids = end_tokens(checkpoint, self.tokenizer)  # now: a converted GGUF file is gone later
        self._shard: Shard | None = None
        self._lock = threading.Lock()  # one row at a time, whichever thread asks

    def __repr__(self) -> str:
        exits, size = ", ".join(map(str, self.exits)), self.model.num_parameters() / 1e6
        kind = str(self.model.dtype).removeprefix("torch.")
        weights = "" if self.weights is None else f", {self.weights} weights"
        return (
            f"Family({self.checkpoint.folder.name}: exits {exits}; {size:,.1f}M parameters, "
            f"{kind}{weights} on {self.model.device})"
        )

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, exit: int | None = None) -> Tensor:
        """Compute the logits of whole sequences at one exit, without a KV cache.

        Args:
            input_ids: (batch, n) token ids.
            exit: the exit. Default: the last one.

        Returns:
            (batch, n, vocab) float32 logits.

        Raises:
            RequestError: the family does not have the exit, or the ids have another shape.
        """
        exit = self._exit(exit)
        ids = self._ids(input_ids).to(self.model.device)
        return self.model.logits(ids, exit)

    def generate(
        self, input_ids: Tensor, exit: int | None = None, max_new_tokens: int | None = None, **options: Any
    ) -> Tensor:
        """Continue sequences, greedily by default. Each row is a request of its own, as over nodes.

        Args:
            input_ids: (batch, n) token ids, without padding.
            exit: the exit that decides every token. Default: the last one.
            max_new_tokens: end a row after at most this many new tokens. Default: that of `SamplingParams`.
            options: other fields of `SamplingParams` (temperature, top_k, seed, …) and of `Routing` (mode, threshold,
                draft, …), and `policy`, a policy file. Defaults are those of a topology that sets no policy, except for
                `draft`, which is 0 and changes no token. Without `seed`, each row draws a new one; with it, each row
                gets the tokens that it gets alone.

        Returns:
            (batch, new) token ids; a row that ended earlier is padded with the token that ended it.

        Raises:
            RequestError: an option has a value that it cannot have, or the family does not have the exit.
            ContextLengthError: the sequences leave no room in the family's context.
        """
        ids = self._ids(input_ids)
        options |= {"exit": None if exit is None else self._exit(exit), "max_new_tokens": max_new_tokens}
        options = {name: value for name, value in options.items() if value is not None}
        if "raw" in options:
            raise RequestError("raw is not an option of Family.generate, which takes token ids")
        check_request_options(options, "policy")
        request = parse_request((0,), {"draft": 0} | with_policy_file(options))
        if request.sampling.logprobs is not None or request.sampling.prompt_logprobs is not None:
            raise RequestError("Family.generate returns token ids alone: use Client for logprobs, or Family.logits")
        if request.sampling.stop:
            raise RequestError("stop strings need text: use Client, or give eos_token_ids here")
        routing = Routing().updated(request.routing)
        if routing.family is not None:
            routing.check_family(self.checkpoint.fingerprint)
        policy = Policy.resolve(routing, self.exits)
        check_context(ids.shape[1], self.config.max_positions)
        room = self.config.max_positions - ids.shape[1]
        with self._lock:
            rows = [
                _run_inline(
                    self._row(row, policy, request.sampling.completed(eos_token_ids=self._eos_token_ids, room=room))
                )
                for row in ids.tolist()
            ]
        width = max(map(len, rows))
        return torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])

    async def _row(self, prompt: Sequence[int], policy: Policy, params: SamplingParams) -> list[int]:
        size = len(prompt) + params.max_new_tokens
        if self._shard is None or self._shard.capacity.pool.num_positions < size:
            self._shard = Shard(self.model, max_positions=max(2048, size), max_sessions=1)
        opening = SessionOpen(max_positions=size, prompt_length=len(prompt), sampling=params, policy=policy)
        lease = self._shard.capacity.lease(size)
        try:
            chain = Chain(self._shard.open(opening, lease), InlineWorker(), "local")
            rounds = decode(chain, prompt, params.max_new_tokens)
            return [d.token async for settled in rounds for d in settled.decisions]
        finally:
            lease.give_back()  # a chain without a next stage holds nothing else

    def _ids(self, input_ids: Tensor) -> Tensor:
        """Check token ids."""
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
        chosen = self.exits[-1] if exit is None else to_token_id(exit)
        if chosen not in self.exits:
            raise RequestError(f"exit {shown(exit)} is not one of the family's exits {list(self.exits)}")
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
        dtype: number format of the layers and the KV cache: float32, bfloat16 or float16.
        exits: exits to give to an ordinary Hugging Face or GGUF checkpoint; its branches are then untrained copies.
        device: a torch device.
        weights: "int8" or "int4" to quantize the weight matrices. Default: as the checkpoint has them.
        compile: whether to run the trunk's layers through `torch.compile`; on a CPU that is slower.

    Raises:
        CheckpointError: the files are missing, truncated or inconsistent.
        ConfigError: the device cannot be used, or torch cannot compile here.
    """
    chosen = parse_dtype(dtype)
    if weights is not None and weights not in tuple(Weights):
        raise RequestError(f"weights is {weights!r}; known: {', '.join(Weights)}")
    held = None if weights is None else Weights(weights)
    if exits is not None and not (isinstance(exits, Sequence) and all(to_token_id(p) is not None for p in exits)):
        raise RequestError(f"exits is {exits!r}; it must be whole numbers, as in [5, 11]")
    how: dict[str, Any] = {"dtype": chosen, "device": device, "weights": held, "compile": compile}
    if str(path_or_name).endswith(".gguf"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / Path(path_or_name).stem
            convert_gguf(path_or_name, folder)
            return Family(Checkpoint(folder, exits), **how)
    return Family(Checkpoint(store.locate(path_or_name), exits), **how)


def _run_inline(coroutine: Any) -> Any:
    """Run a coroutine that never waits, since all its stages are in this process."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a stage in this process waited")
