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
    theirs = AutoConfig.for_model(**raw | {"model_type": config.base, "num_hidden_layers": exit + 1})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs, dtype=dtype)
    state: dict[str, torch.Tensor] = {}
    branch = f"model.layers.{exit}" if exit == exits[-1] else f"model.eelayers.{exits.index(exit)}"
    for name in model.state_dict():
        source = name.replace(f"model.layers.{exit}.", f"{branch}.")
        source = source.replace("model.norm.", f"model.norms.{exits.index(exit)}.")
        if name == "lm_head.weight":
            source = "model.embed_tokens.weight" if config.tied_head else "lm_head.weight"
        state[name] = checkpoint.tensor(source).to(dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs)  # its buffer is computed, not loaded
    return model.eval()
