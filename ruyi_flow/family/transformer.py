"""The one definition of a family's layers: Llama, Qwen2 and Qwen3 decoder layers, exits, and any slice of them.

Everything that serves, trains or evaluates a family runs these modules. States are flat, `(n, hidden)`: what belongs to
which sequence is known to the attention that a caller passes in, not to the layers, so one matrix product serves any
mix of sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ruyi_flow.errors import CheckpointError, ConfigError
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.linear import Linear

__all__ = [
    "Attention",
    "Branch",
    "CausalAttention",
    "DecoderLayer",
    "FamilySlice",
    "Probe",
    "Rope",
]


class Attention(Protocol):
    """Where keys and values are kept and looked up."""

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """Attend; keeps k and v of all n rows under `slot`.

        Args:
            slot: which layer's keys and values these are, as the caller numbers them.
            q: (m, heads, head_dim) with rotary positions applied.
            k: (n, kv_heads, head_dim), likewise.
            v: (n, kv_heads, head_dim).
            rows: (m,) the rows that q is of; None when m = n.

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
        """The weight, once it will not change any more: found without a search through the module's parameters."""
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
        """Take the weight as it is now for good; for serving on a CPU."""
        self.fixed = self.weight.detach()
        self._zero = torch.zeros(1, dtype=self.fixed.dtype)


class Rope:
    """Rotary position embedding (Su et al. 2021) with the scalings that transformers computes.

    Tables grow with the positions asked for, so that a long context costs nothing until it is used.
    """

    def __init__(self, config: FamilyConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.inv_freq, self.scale = _inverse_frequencies(config)
        self.dtype, self.device = dtype, device
        self.cos = self.sin = torch.empty(0, 1, config.head_dim, dtype=dtype, device=device)

    def at(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each (stop - start, 1, head_dim), for `rotate`."""
        if stop > self.cos.shape[0]:
            freqs = torch.outer(torch.arange(max(256, 2 * stop), dtype=torch.float32), self.inv_freq)
            cos, sin = freqs.cos() * self.scale, freqs.sin() * self.scale
            self.cos = torch.cat((cos, cos), -1).unsqueeze(1).to(self.device, self.dtype)
            self.sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(self.device, self.dtype)
        return self.cos[start:stop], self.sin[start:stop]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (n, heads, head_dim) by its positions; the swapped half's sign is in `sin`, so this is three kernels."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each with a norm before and a residual around it."""

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
        # The same once more, where Python finds them without a search through the module's parts.
        self._first = self.input_layernorm, self.qkv_proj, self.o_proj
        self._second = self.post_attention_layernorm, self.gate_up_proj, self.down_proj
        self._norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: Attention,
        slot: int,
        rows: Tensor | None = None,
    ) -> Tensor | None:
        """Run the layer.

        Args:
            x: (n, hidden).
            rope: cosines and sines of the n positions, from `Rope.at`.
            attention: keeps keys and values, and attends.
            slot: this layer's number there.
            rows: (m,) the rows whose output is wanted; the others get keys and values only. None means all.

        Returns:
            (m, hidden), or None when no row is wanted.
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
    """Reads off an early branch whether its token will be the last branch's.

    A small perceptron over the branch's normed state, scaled to unit size, and the logarithms of its likeliest tokens'
    probabilities; as in early exits with a learned stopping head (Schuster et al. 2022, CALM, section 3.5), but on what
    the branch itself says, too.
    """

    TOP = 16
    """Tokens whose probabilities it sees."""

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size + self.TOP, config.probe_size)
        self.down = nn.Linear(config.probe_size, 1)

    def forward(self, h: Tensor, logits: Tensor) -> Tensor:
        """What the head reads, (n, hidden), and the (n, vocab) logits -> (n,) float32 log-odds of agreement."""
        return self.odds(self.seen(h, logits))

    def seen(self, h: Tensor, logits: Tensor) -> Tensor:
        """What it reads off a branch: (n, hidden + TOP) float32."""
        logits = logits.float()
        top = logits.topk(min(self.TOP, logits.shape[-1]), -1).values - logits.logsumexp(-1, keepdim=True)
        top = F.pad(top.clamp(min=-30.0), (0, self.TOP - top.shape[-1]), value=-30.0)
        return torch.cat([F.rms_norm(h.float(), h.shape[-1:]), top], -1)

    def odds(self, seen: Tensor) -> Tensor:
        """What it makes of that: (n,) log-odds of agreement."""
        up = F.silu(F.linear(seen, self.up.weight.float(), self.up.bias.float()))
        return F.linear(up, self.down.weight.float(), self.down.bias.float())[:, 0]


class Branch(nn.Module):
    """What turns the boundary state at an exit into logits: decoder layers, a norm, and a head that others may share.

    Args:
        config: the family.
        depth: how many layers.
        probed: whether it has a probe.
    """

    def __init__(self, config: FamilyConfig, depth: int, *, probed: bool = False) -> None:
        super().__init__()
        self.stack = tuple(DecoderLayer(config) for _ in range(depth))
        self.layers = nn.ModuleList(self.stack)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.probe = Probe(config) if probed else None


class FamilySlice(nn.Module):
    """Any consecutive stages of a family: the whole of it, a node's shard, or one stage.

    Args:
        config: the family.
        exits: the exits of the stages, consecutive.
    """

    def __init__(self, config: FamilyConfig, exits: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.stages = config.stages(tuple(exits))
        self.exits = tuple(exits)
        self.first_layer, self.last_layer = self.stages[0][0], self.stages[-1][1]
        is_entry = self.first_layer == 0
        heads = 1 if config.shared_heads else len(self.exits)
        # Without random numbers: to draw an embedding's on "meta" torch would import 78 MB of its compiler.
        table = torch.empty(config.vocab_size, config.hidden_size) if is_entry else None
        self.embed_tokens = None if table is None else nn.Embedding.from_pretrained(table, freeze=False)
        # Plain containers for the hot path, beside the module containers that hold the same modules for torch.
        self.trunk = tuple(DecoderLayer(config) for _ in range(self.first_layer, self.last_layer))
        depths = {p: config.branch_layers[config.exits.index(p)] for p in self.exits}
        probed = config.exits[:-1] if config.probe_size else ()
        self.branch_at = {p: Branch(config, depth, probed=p in probed) for p, depth in depths.items()}
        own_heads = [Linear(config.hidden_size, (config.vocab_size,), bias=False) for _ in range(heads)]
        self.head_at = {p: own_heads[0 if config.shared_heads else i] for i, p in enumerate(self.exits)}
        self.slot_at = {
            p: len(self.trunk) + sum(depth for other, depth in depths.items() if other < p) for p in self.exits
        }
        """Slot of the keys and values of each branch's first layer, never a trunk layer's; the others' follow."""
        self.call: Callable[..., Tensor | None] = DecoderLayer.forward
        """How a trunk layer is called: training may put a call in between that recomputes what it does not keep, and
        `compile_layers` puts the compiled one."""
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(self.trunk, self.first_layer)})
        self.branches = nn.ModuleDict({str(p): branch for p, branch in self.branch_at.items()})
        self.heads = nn.ModuleList(own_heads)
        if config.tied_head and self.embed_tokens is not None:
            self.heads[0].weight = self.embed_tokens.weight

    @property
    def num_slots(self) -> int:
        """Layers that keep keys and values: the trunk's, then the branches'."""
        return len(self.trunk) + sum(len(branch.stack) for branch in self.branch_at.values())

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.trunk[0].input_layernorm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format."""
        return self.trunk[0].input_layernorm.weight.dtype

    def embed(self, token_ids: Tensor) -> Tensor:
        """(n,) token ids -> (n, hidden)."""
        if self.embed_tokens is None:
            return self.heads[0].embedding(token_ids)  # type: ignore[operator, no-any-return]
        return F.embedding(token_ids, self.embed_tokens.weight)

    def embed_with_head(self) -> None:
        """Look tokens up in the head, which is the embedding, too, and holds it in 8 bits."""
        self.embed_tokens = None

    @torch.inference_mode()
    def compile_layers(self) -> None:
        """Run the trunk's layers through `torch.compile` from now on; inference only, of layers that are not packed.

        The layers share what is compiled: for one row, and for any more. It is compiled here, for the CPU threads that
        this thread has now. Attention stays as it is.

        Raises:
            ConfigError: there is nothing to compile with.
        """
        # torch's overloads do not have the last one, which keeps families of one process out of each other's limit.
        compiled: Callable[..., Tensor | None] = torch.compile(  # type: ignore[call-overload]
            DecoderLayer.forward, dynamic=True, isolate_recompiles=True
        )

        class Uncompiled:
            """An attention that `torch.compile` does not look into; here, since the decorator imports the compiler."""

            def __init__(self, attention: Attention) -> None:
                self._attention = attention

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
                return self._attention(slot, q, k, v, rows)

        def call(
            layer: DecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention, slot: int
        ) -> Tensor | None:
            if not x.is_inference():  # made outside of inference mode: to the compiler, a tensor of another kind
                x = x.clone()
            return compiled(layer, x, rope, Uncompiled(attention), slot)

        layer, hidden = self.trunk[0], self.config.hidden_size
        rope = Rope(self.config, self.dtype, self.device)
        try:
            for n in (1, 2, 32):  # 8-bit products have two ways, by the number of rows
                x = torch.zeros(n, hidden, dtype=self.dtype, device=self.device)
                call(layer, x, rope.at(0, n), CausalAttention(1), 0)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip().splitlines()[0]
            needed = "Triton" if self.device.type == "cuda" else "a C++ compiler (g++, or what CXX names)"
            raise ConfigError(f"torch.compile needs {needed}; leave it out. It says: {reason}") from None
        self.call = call

    def run(self, x: Tensor, start: int, stop: int, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """Run trunk layers `start … stop-1`, the only way a trunk is ever run.

        Args:
            x: (n, hidden) boundary states at `start` (embeddings when 0).

        Returns:
            (n, hidden) boundary states at `stop`.
        """
        first = self.first_layer
        for i in range(start - first, stop - first):
            out = self.call(self.trunk[i], x, rope, attention, i)
            assert out is not None
            x = out
        return x

    def branch(
        self, exit: int, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention, rows: Tensor | None = None
    ) -> Tensor | None:
        """Run the branch at an exit on boundary states.

        Args:
            x: (n, hidden) boundary states at the exit.
            rows: (m,) the rows whose logits are wanted; None means all.

        Returns:
            (m, vocab) logits in the weights' number format, or None when no row is wanted.
        """
        h = self.reading(exit, x, rope, attention, rows)
        return None if h is None else self.head_at[exit].forward(h)

    def reading(
        self, exit: int, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention, rows: Tensor | None = None
    ) -> Tensor | None:
        """(m, hidden): what the branch's head reads, its normed state; see `branch`."""
        branch, slot = self.branch_at[exit], self.slot_at[exit]
        *first, last = branch.stack
        for layer in first:  # what comes after needs every row of these
            out = layer.forward(x, rope, attention, slot)
            assert out is not None
            x, slot = out, slot + 1
        h = last.forward(x, rope, attention, slot, rows)
        return None if h is None else branch.norm.forward(h)

    def logits(self, input_ids: Tensor, exit: int) -> Tensor:
        """Whole sequences through every layer up to an exit, without a cache: the oracle.

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
        x = self.run(self.embed(input_ids.flatten()), 0, exit, rope, attention)
        logits = self.branch(exit, x, rope, attention)
        assert logits is not None
        return logits.float().view(batch, n, -1)

    def num_parameters(self) -> int:
        """Parameters of the checkpoint that this slice holds; a head that is the embedding counts once."""
        linears = [m for m in self.modules() if isinstance(m, Linear)]
        inside = sum(m.num_parameters() for m in linears)
        seen = {id(t) for m in linears for t in m.parameters()}
        others = sum(t.numel() for t in self.parameters() if id(t) not in seen)
        if self.config.tied_head and self.embed_tokens is not None and self.heads[0].kernels:  # it is there twice
            others -= self.embed_tokens.weight.numel()
        return inside + others

    def tensor_bytes(self) -> int:
        """Bytes of the distinct tensors that this slice holds, packed ones included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        kernels = [kernel for m in self.modules() if isinstance(m, Linear) for kernel in m.kernels]
        tensors = [*self.parameters(), *(tensor for kernel in kernels for tensor in (*kernel.tensors, kernel.bias))]
        return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


class CausalAttention:
    """Attention of whole sequences to themselves, without a cache.

    Args:
        batch: number of sequences of equal length that lie one after the other in the flat states.
        documents: (batch, n) which document each position is of, where sequences are packed with several; positions
            see their own document only. None where a sequence is one document.
        root: number of the document that all others of its sequence see, too.
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
    """(head_dim / 2,) inverse frequencies and the factor on cosines and sines."""
    kind, theta = config.rope["rope_type"], float(config.rope["rope_theta"])
    if kind == "default":
        return 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(f"rope_type is {kind!r}; known: default, linear, llama3, yarn")
    from transformers import PreTrainedConfig  # LlamaConfig would bring in 90 MB of its model
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        their_config = PreTrainedConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            rope_parameters=dict(config.rope),
        )
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](their_config, torch.device("cpu"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"rope settings {dict(config.rope)} are not whole: {error}") from None
    return inv_freq.float(), float(scale)
