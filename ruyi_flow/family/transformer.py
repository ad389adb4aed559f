"""The layers of a family: Llama, Qwen2 and Qwen3 decoder layers, branches, and slices of consecutive stages.

Everything that serves, trains or evaluates a family runs these modules. States are flat, `(n, hidden)`. Only the
attention, which the caller passes in, knows which row belongs to which sequence, so one matrix product serves any mix
of sequences.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ruyi_flow.errors import ConfigError, ContextLengthError
from ruyi_flow.family.config import PROBE_TOP, FamilyConfig
from ruyi_flow.family.linear import Linear

__all__ = ["Attention", "Branch", "CausalAttention", "DecoderLayer", "FamilySlice", "Probe", "Rope"]


class Attention(Protocol):
    """Attention with a KV cache of any kind, passed in by the caller."""

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """Store the keys and values of all n rows, and attend.

        Args:
            slot: number of the layer in the KV cache, chosen by the caller.
            q: (m, heads, head_dim) with rotary positions applied.
            k: (n, kv_heads, head_dim) with rotary positions applied.
            v: (n, kv_heads, head_dim).
            rows: (m,) indices of the rows that have queries; None if all n have.

        Returns:
            (m, heads * head_dim)
        """
        ...


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.shape, self.size, self.eps = (size,), size, eps
        self.fixed: Tensor | None = None
        """The weight after `freeze`; reading it is faster than looking up a module's parameter."""
        self._zero = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """(n, size) -> (n, size)"""
        weight = self.fixed
        if weight is None:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        if x.numel() != self.size:
            return torch.rms_norm(x, self.shape, weight, self.eps)
        # One row on a CPU: torch's own is eight kernels of 12 µs, this is two of 5 (docs/log.md).
        length = torch.linalg.vector_norm(x, dtype=torch.float32).item()
        return torch.addcmul(self._zero, x, weight, value=1 / math.sqrt(length * length / self.size + self.eps))

    def freeze(self) -> None:
        """Fix the weight for good, which makes single rows faster; for serving on a CPU."""
        self.fixed = self.weight.detach()
        self._zero = torch.zeros(1, dtype=self.fixed.dtype)


class Rope:
    """Rotary position embedding (Su et al. 2021), with the context scalings of the transformers library.

    Tables grow with the positions that are requested, so a long context costs no memory until it is used.
    """

    def __init__(self, config: FamilyConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.inv_freq, self.scale = _inverse_frequencies(config)
        self.dtype, self.device = dtype, device
        self.most = config.max_positions if config.rope["rope_type"] == "dynamic" else sys.maxsize
        """Positions for which the frequencies hold."""
        self.cos = self.sin = torch.empty(0, 1, config.head_dim, dtype=dtype, device=device)

    def at(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines of positions `start … stop-1` for `rotate`: (stop - start, 1, head_dim).

        Raises:
            ContextLengthError: positions past the context change all frequencies (rope_type dynamic).
        """
        if stop > self.cos.shape[0]:
            if stop > self.most:
                raise ContextLengthError(f"rope_type dynamic is supported up to {self.most} positions, not for {stop}")
            size = min(max(256, 2 * stop), self.most)
            freqs = torch.outer(torch.arange(size, dtype=torch.float32), self.inv_freq)
            cos, sin = freqs.cos() * self.scale, freqs.sin() * self.scale
            self.cos = torch.cat((cos, cos), -1).unsqueeze(1).to(self.device, self.dtype)
            self.sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(self.device, self.dtype)
        return self.cos[start:stop], self.sin[start:stop]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to (n, heads, head_dim). `sin` contains the sign of the swapped half: three kernels."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class DecoderLayer(nn.Module):
    """A decoder layer: attention and a gated MLP, each with a norm before it and a residual around it."""

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__()
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, d
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv_proj = Linear(config.hidden_size, (heads * d, 2 * kv_heads * d), config.attention_bias)
        self.o_proj = Linear(heads * d, (config.hidden_size,), config.output_bias)
        has_norms = config.base == "qwen3"
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if has_norms else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if has_norms else None
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        m = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, (m, m), config.mlp_bias)
        self.down_proj = Linear(m, (config.hidden_size,), config.mlp_bias)
        # The same modules in tuples: reading these is faster than looking up a module's submodule.
        self._first = self.input_layernorm, self.qkv_proj, self.o_proj
        self._second = self.post_attention_layernorm, self.gate_up_proj, self.down_proj
        self._norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention, slot: int, *, rows: Tensor | None = None
    ) -> Tensor | None:
        """Run the layer.

        Args:
            x: (n, hidden) input states.
            rope: cosines and sines of the n positions, from `Rope.at`.
            attention: stores keys and values, and attends.
            slot: number of this layer in the KV cache.
            rows: (m,) indices of the rows whose output is needed; for the others, only keys and values are computed.
                Default: all rows.

        Returns:
            (m, hidden) output states, or None if `rows` is empty.
        """
        heads, kv, d, norms = self.num_heads, self.num_kv_heads, self.head_dim, self._norms
        norm, qkv_proj, o_proj = self._first
        h = norm.forward(x)
        if rows is None:
            qkv = qkv_proj.run(h).view(-1, heads + 2 * kv, d)
            if norms is None:
                qk = rotate(qkv[:, : heads + kv], *rope)
                attended = attention(slot, qk[:, :heads], qk[:, heads:], qkv[:, heads + kv :], None)
            else:
                q, k, v = qkv.split((heads, kv, kv), 1)
                q, k = rotate(norms[0].forward(q), *rope), rotate(norms[1].forward(k), *rope)
                attended = attention(slot, q, k, v, None)
        else:
            k, v = qkv_proj.part(h, 1).view(-1, 2 * kv, d).split((kv, kv), 1)
            q = qkv_proj.part(h[rows], 0).view(-1, heads, d)
            if norms is not None:
                q, k = norms[0].forward(q), norms[1].forward(k)
            q, k = rotate(q, rope[0][rows], rope[1][rows]), rotate(k, *rope)
            x = x[rows]
            attended = attention(slot, q, k, v, rows)
            if not len(rows):
                return None
        x = x + o_proj.run(attended)
        norm, gate_up_proj, down_proj = self._second
        gate, up = gate_up_proj.run(norm.forward(x)).chunk(2, -1)
        return x + down_proj.run(F.silu(gate).mul_(up))


class Probe(nn.Module):
    """A classifier that predicts whether an early branch's token agrees with the last branch's.

    Its input is the branch's normed state, scaled to unit size, and the log-probabilities of the branch's most probable
    tokens; it has one hidden layer. CALM (Schuster et al. 2022, section 3.5) has such a classifier of the state alone.
    """

    TOP = PROBE_TOP
    """Number of log-probabilities in its input."""

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size + self.TOP, config.probe_size)
        self.down = nn.Linear(config.probe_size, 1)

    def forward(self, h: Tensor, logits: Tensor) -> Tensor:
        """Predict agreement: (n, hidden) normed states and (n, vocab) logits -> (n,) float32 log-odds."""
        return self.log_odds(self.features(h, logits))

    def features(self, h: Tensor, logits: Tensor) -> Tensor:
        """Compute the input from normed states and logits: (n, hidden + TOP) float32."""
        logits = logits.float()
        top = logits.topk(min(self.TOP, logits.shape[-1]), -1).values - logits.logsumexp(-1, keepdim=True)
        top = F.pad(top.clamp(min=-30.0), (0, self.TOP - top.shape[-1]), value=-30.0)
        return torch.cat([F.rms_norm(h.float(), h.shape[-1:]), top], -1)

    def log_odds(self, features: Tensor) -> Tensor:
        """Predict agreement from `features`: (n,) log-odds."""
        up = F.silu(F.linear(features, self.up.weight.float(), self.up.bias.float()))
        return F.linear(up, self.down.weight.float(), self.down.bias.float())[:, 0]


class Branch(nn.Module):
    """The decoder layers and the norm between the boundary state at an exit and its LM head, which exits may share.

    Args:
        config: geometry of the family.
        depth: number of decoder layers.
        probed: whether the branch has a `Probe`.
    """

    def __init__(self, config: FamilyConfig, depth: int, *, probed: bool = False) -> None:
        super().__init__()
        self.stack = tuple(DecoderLayer(config) for _ in range(depth))
        self.layers = nn.ModuleList(self.stack)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.probe = Probe(config) if probed else None


class FamilySlice(nn.Module):
    """Consecutive stages of a family: the whole family, a node's shard, or one stage.

    Args:
        config: geometry of the family.
        exits: consecutive exits, at which the stages end.
    """

    def __init__(self, config: FamilyConfig, exits: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.stages = config.stages(tuple(exits))
        self.exits = tuple(exits)
        self.first_layer, self.last_layer = self.stages[0][0], self.stages[-1][1]
        is_entry = self.first_layer == 0
        heads = 1 if config.shared_heads else len(self.exits)
        # nn.Embedding would draw random numbers, for which torch imports 78 MB of its compiler on "meta".
        table = torch.empty(config.vocab_size, config.hidden_size) if is_entry else None
        self.embed_tokens = None if table is None else nn.Embedding.from_pretrained(table, freeze=False)
        # Plain containers for the hot path; the module containers below register the same modules with torch.
        self.trunk = tuple(DecoderLayer(config) for _ in range(self.first_layer, self.last_layer))
        depths = {p: config.branch_layers[config.exits.index(p)] for p in self.exits}
        probed = config.exits[:-1] if config.probe_size else ()
        self.branch_at = {p: Branch(config, depth, probed=p in probed) for p, depth in depths.items()}
        own_heads = [Linear(config.hidden_size, (config.vocab_size,), bias=False) for _ in range(heads)]
        self.head_at = {p: own_heads[0 if config.shared_heads else i] for i, p in enumerate(self.exits)}
        slots = accumulate(depths.values(), initial=len(self.trunk))
        self.slot_at = dict(zip(self.exits, slots, strict=False))
        """Slot in the KV cache of each branch's first layer; the slots of its other layers follow."""
        self.call: Callable[..., Tensor | None] = DecoderLayer.forward
        """Runs a trunk layer. `compile_layers` replaces it with the compiled one, training with gradient
        checkpointing."""
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(self.trunk, self.first_layer)})
        self.branches = nn.ModuleDict({str(p): branch for p, branch in self.branch_at.items()})
        self.heads = nn.ModuleList(own_heads)
        if config.tied_head and self.embed_tokens is not None:
            self.heads[0].weight = self.embed_tokens.weight

    @property
    def num_slots(self) -> int:
        """Number of layers in the KV cache: the trunk's, then the branches'."""
        return len(self.trunk) + sum(len(branch.stack) for branch in self.branch_at.values())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.trunk[0].input_layernorm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.trunk[0].input_layernorm.weight.dtype

    def embed(self, token_ids: Tensor) -> Tensor:
        """Look up token embeddings: (n,) token ids -> (n, hidden)."""
        if self.embed_tokens is None:
            return self.heads[0].embedding(token_ids)  # type: ignore[operator, no-any-return]
        return F.embedding(token_ids, self.embed_tokens.weight)

    def embed_with_head(self) -> None:
        """Drop the embedding and look tokens up in the tied, quantized LM head instead."""
        self.embed_tokens = None

    @torch.inference_mode()
    def compile_layers(self) -> None:
        """Compile the trunk's layers with `torch.compile`; inference only, needs layers that are not packed.

        All layers share two compiled versions, for one row and for more. They are compiled in this call, for the
        number of CPU threads that torch has now. Attention is not compiled.

        Raises:
            ConfigError: a compiler is missing, or the environment forbids compiling.
        """
        if off := [name for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE") if os.environ.get(name) == "1"]:
            raise ConfigError(f"{off[0]} is set in the environment, so torch compiles nothing; unset it")
        # torch's overloads lack isolate_recompiles, which gives every family of a process a recompile limit of its own.
        compiled: Callable[..., Tensor | None] = torch.compile(  # type: ignore[call-overload]
            DecoderLayer.forward, dynamic=True, isolate_recompiles=True
        )

        class Uncompiled:
            """An attention that is not compiled. Defined here since the decorator imports the compiler."""

            def __init__(self, attention: Attention) -> None:
                self._attention = attention

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
                return self._attention(slot, q, k, v, rows)

        def call(
            layer: DecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention, slot: int
        ) -> Tensor | None:
            if not x.is_inference():  # a tensor from outside inference mode would be compiled for once more
                x = x.clone()
            return compiled(layer, x, rope, Uncompiled(attention), slot)

        layer, hidden = self.trunk[0], self.config.hidden_size
        rope = Rope(self.config, self.dtype, self.device)
        try:
            for n in (1, 2, 32):  # 8-bit products take another path from some number of rows on
                x = torch.zeros(n, hidden, dtype=self.dtype, device=self.device)
                call(layer, x, rope.at(0, n), CausalAttention(1), 0)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip().splitlines()[0]
            needed = "Triton" if self.device.type == "cuda" else "a C++ compiler (g++, or what CXX names)"
            raise ConfigError(f"torch.compile needs {needed} ({reason}); install it, or do not compile") from None
        self.call = call

    def run(self, x: Tensor, start: int, stop: int, *, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """Run trunk layers `start … stop-1`.

        Args:
            x: (n, hidden) boundary states at `start`; token embeddings if `start` is 0.
            start: first trunk layer, numbered as in the family.
            stop: trunk layer to stop before, usually an exit.
            rope: cosines and sines of the n positions, from `Rope.at`.
            attention: stores keys and values, and attends.

        Returns:
            (n, hidden) boundary states at `stop`.
        """
        first = self.first_layer
        for i in range(start - first, stop - first):
            out = self.call(self.trunk[i], x, rope, attention, i)
            assert out is not None
            x = out
        return x

    def branch_logits(
        self, exit: int, x: Tensor, *, rope: tuple[Tensor, Tensor], attention: Attention, rows: Tensor | None = None
    ) -> Tensor | None:
        """Run the branch and the LM head of an exit.

        Args:
            exit: one of this slice's exits.
            x: (n, hidden) boundary states at the exit.
            rope, attention: see `run`.
            rows: (m,) indices of the rows whose logits are needed. Default: all rows.

        Returns:
            (m, vocab) logits in the weights' number format, or None if `rows` is empty.
        """
        h = self.branch_states(exit, x, rope=rope, attention=attention, rows=rows)
        return None if h is None else self.head_at[exit].forward(h)

    def branch_states(
        self, exit: int, x: Tensor, *, rope: tuple[Tensor, Tensor], attention: Attention, rows: Tensor | None = None
    ) -> Tensor | None:
        """Run the branch of an exit up to its norm: (m, hidden), the input of the LM head; see `branch_logits`."""
        branch, slot = self.branch_at[exit], self.slot_at[exit]
        *first, last = branch.stack
        for layer in first:  # the last layer attends to every row of these
            out = layer.forward(x, rope, attention, slot)
            assert out is not None
            x, slot = out, slot + 1
        h = last.forward(x, rope, attention, slot, rows=rows)
        return None if h is None else branch.norm.forward(h)

    def logits(self, input_ids: Tensor, exit: int) -> Tensor:
        """Run whole sequences through one exit without a KV cache, as a reference for every other way.

        Args:
            input_ids: (batch, n) token ids.
            exit: one of this slice's exits.

        Returns:
            (batch, n, vocab) float32
        """
        batch, n = input_ids.shape
        weight = self.trunk[0].input_layernorm.weight
        cos, sin = Rope(self.config, weight.dtype, weight.device).at(0, n)
        rope = cos.repeat(batch, 1, 1), sin.repeat(batch, 1, 1)
        attention = CausalAttention(batch)
        x = self.run(self.embed(input_ids.flatten()), 0, exit, rope=rope, attention=attention)
        logits = self.branch_logits(exit, x, rope=rope, attention=attention)
        assert logits is not None
        return logits.float().view(batch, n, -1)

    def num_parameters(self) -> int:
        """Count the checkpoint's parameters in this slice; a tied embedding and head count once."""
        linears = [m for m in self.modules() if isinstance(m, Linear)]
        inside = sum(m.num_parameters() for m in linears)
        seen = {id(t) for m in linears for t in m.parameters()}
        others = sum(t.numel() for t in self.parameters() if id(t) not in seen)
        if self.config.tied_head and self.embed_tokens is not None and self.heads[0].kernels:  # stored twice
            others -= self.embed_tokens.weight.numel()
        return inside + others

    def tensor_bytes(self) -> int:
        """Count the bytes of this slice's tensors in memory, each once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        kernels = [kernel for m in self.modules() if isinstance(m, Linear) for kernel in m.kernels]
        tensors = [*self.parameters(), *(tensor for kernel in kernels for tensor in (*kernel.tensors, kernel.bias))]
        return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


class CausalAttention:
    """Causal attention within whole sequences, without a KV cache.

    Args:
        batch: number of sequences, all of one length, that follow one another in the flat states.
        documents: (batch, n) number of the document that each position belongs to, for sequences that contain several;
            positions attend to their own document only. Default: one document a sequence.
        root: number of a document that all documents of the same sequence attend to as well. Default: none.
    """

    def __init__(self, batch: int, documents: Tensor | None = None, *, root: int | None = None) -> None:
        self.batch, self.mask = batch, None
        if documents is not None:
            n = documents.shape[1]
            before = torch.ones(n, n, dtype=torch.bool, device=documents.device).tril()
            seen = documents[:, :, None] == documents[:, None, :]
            if root is not None:
                seen |= documents[:, None, :] == root
            self.mask = (before & seen)[:, None]  # (batch, 1, n, n)

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is None
        q, k, v = (t.unflatten(0, (self.batch, -1)).transpose(1, 2) for t in (q, k, v))  # (batch, heads, n, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


def _inverse_frequencies(config: FamilyConfig) -> tuple[Tensor, float]:
    """Return the (head_dim / 2,) inverse frequencies, and the factor on cosines and sines."""
    kind, theta = config.rope["rope_type"], float(config.rope["rope_theta"])
    if kind in ("default", "dynamic"):  # dynamic scales nothing within the context
        return 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim), 1.0
    from transformers import PreTrainedConfig  # LlamaConfig would import 90 MB of its model
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"hidden_size": config.hidden_size, "num_attention_heads": config.num_heads, "head_dim": config.head_dim}
    rope = {"max_position_embeddings": config.max_positions, "rope_parameters": dict(config.rope)}
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](PreTrainedConfig(**sizes, **rope), torch.device("cpu"))
    return inv_freq.float(), float(scale)
