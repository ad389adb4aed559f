"""transformers' own model with a family's weights: the other side of comparisons."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ruyi_flow.family.checkpoint import Checkpoint


def as_transformers(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, exit: int | None = None) -> Any:
    """The trunk up to an exit (by default the last) and its branch, as the ordinary model of that depth."""
    config, exits = checkpoint.config, checkpoint.config.exits
    exit = exits[-1] if exit is None else exit
    raw = {k: v for k, v in config.raw.items() if k not in ("early_exit_points", "architectures", "auto_map")}
    branch = config.branch_prefixes(exit)
    theirs = AutoConfig.for_model(**raw | {"model_type": config.base, "num_hidden_layers": exit + len(branch)})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs, dtype=dtype)
    state: dict[str, torch.Tensor] = {}
    for name in model.state_dict():
        source = name
        for i, prefix in enumerate(branch):
            source = source.replace(f"model.layers.{exit + i}.", f"{prefix}.")
        source = source.replace("model.norm.", f"model.norms.{exits.index(exit)}.")
        if name == "lm_head.weight":
            own = "lm_head.weight" if config.shared_heads else f"lm_head.{exits.index(exit)}.weight"
            source = "model.embed_tokens.weight" if config.tied_head else own
        state[name] = checkpoint.tensor(source).to(dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs)  # its buffer is computed, not loaded
    return model.eval()
