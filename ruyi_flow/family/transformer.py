"""The one definition of a family's layers: Llama, Qwen2 and Qwen3 decoder layers, exits, and any slice of them.

Everything that serves, trains or evaluates a family runs these modules. States are flat, `(n, hidden)`: what belongs to
which sequence is known to the attention that a caller passes in, not to the layers, so one matrix product serves any
mix of sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family.config import FamilyConfig

__all__ = [
    "Attention",
    "Branch",
    "CausalAttention",
    "DecoderLayer",
    "FamilySlice",
    "Linear",
    "Probe",
    "Rope",
    "pack",
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


class Linear(nn.Module):
    """`x @ weight.T + bias`, whose weight can be packed for the CPU's matrix units.

    A packed weight is laid out by oneDNN for small batches, the layout that `torch.compile` gives to frozen models. For
    one row in bf16 that took 12.2 ms instead of 18.0 for all the products of SmolLM2-135M (docs/log.md). Several
    products of the same input are one `Linear` with the sum of their output sizes; `part` runs only some of its rows.
    """

    def __init__(self, in_features: int, out_features: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.splits = tuple(out_features)
        self.weight = nn.Parameter(torch.empty(sum(self.splits), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.splits))) if bias else None
        self.packed: tuple[Tensor, ...] | None = None
        self.packed_bias: tuple[Tensor | None, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, sum(splits))"""
        packed = self.packed
        if packed is None:
            return F.linear(x, self.weight, self.bias)
        if len(packed) == 1:
            return _packed_linear(x, packed[0], self.packed_bias[0])
        return torch.cat([_packed_linear(x, w, b) for w, b in zip(packed, self.packed_bias, strict=True)], dim=-1)

    def part(self, x: Tensor, index: int) -> Tensor:
        """(n, in) -> (n, splits[index]): one of the products alone.

        A packed weight must have been packed apart.
        """
        if self.packed is not None:
            return _packed_linear(x, self.packed[index], self.packed_bias[index])
        start = sum(self.splits[:index])
        rows = slice(start, start + self.splits[index])
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])

    def pack(self, *, apart: bool = False) -> None:
        """Give up the weight for its packed form; inference only.

        Args:
            apart: pack each product for itself, so that `part` can run it alone.
        """
        parts = self.splits if apart else (sum(self.splits),)
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        self.packed = tuple(torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), 1) for w in weight.split(parts))
        self.packed_bias = tuple(b.clone() for b in bias.split(parts)) if bias is not None else (None,) * len(parts)
        del self.weight, self.bias
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def pack(module: nn.Module, *, apart: Collection[Linear] = ()) -> None:
    """Pack the products below a module for serving on a CPU, where their number format can be; inference only.

    Args:
        apart: those of them whose parts must be able to run alone.
    """
    for linear in module.modules():
        if (
            isinstance(linear, Linear)
            and linear.packed is None
            and _can_pack(linear.weight.dtype, linear.weight.device)
        ):
            linear.pack(apart=linear in apart)


def _can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.shape = (size,)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


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
        heads, kv, d = self.num_heads, self.num_kv_heads, self.head_dim
        h = self.input_layernorm.forward(x)
        if rows is None:
            qkv = self.qkv_proj.forward(h).view(-1, heads + 2 * kv, d)
            if self.q_norm is None:
                qk, v = rotate(qkv[:, : heads + kv], *rope), qkv[:, heads + kv :]
                q, k = qk[:, :heads], qk[:, heads:]
            else:
                q, k, v = qkv.split((heads, kv, kv), 1)
                q, k = rotate(self.q_norm.forward(q), *rope), rotate(self.k_norm.forward(k), *rope)  # type: ignore[union-attr]
        else:
            k, v = self.qkv_proj.part(h, 1).view(-1, 2 * kv, d).split((kv, kv), 1)
            q = self.qkv_proj.part(h[rows], 0).view(-1, heads, d)
            if self.q_norm is not None:
                q, k = self.q_norm.forward(q), self.k_norm.forward(k)  # type: ignore[union-attr]
            q, k = rotate(q, rope[0][rows], rope[1][rows]), rotate(k, *rope)
            x = x[rows]
        attended = attention(slot, q, k, v, rows)
        if rows is not None and not len(rows):
            return None
        x = x + self.o_proj.forward(attended)
        gate, up = self.gate_up_proj.forward(self.post_attention_layernorm.forward(x)).chunk(2, -1)
        return x + self.down_proj.forward(F.silu(gate) * up)


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
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if is_entry else None
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
        """How a layer is called; training may put a call in between that recomputes what it does not keep."""
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
        assert self.embed_tokens is not None
        return F.embedding(token_ids, self.embed_tokens.weight)

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
        packed_twice = self.config.tied_head and self.embed_tokens is not None and self.heads[0].packed is not None
        twice = self.config.vocab_size * self.config.hidden_size if packed_twice else 0
        return sum(tensor.numel() for tensor in self._tensors()) - twice

    def tensor_bytes(self) -> int:
        """Bytes of the distinct tensors that this slice holds, packed ones included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        packed = [m for m in self.modules() if isinstance(m, Linear) and m.packed is not None]
        tensors = [
            *self.parameters(),
            *(t for m in packed for t in (*(m.packed or ()), *m.packed_bias) if t is not None),
        ]
        return list({id(tensor): tensor for tensor in tensors}.values())


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
