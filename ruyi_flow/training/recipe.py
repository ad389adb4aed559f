"""Recipes: YAML files that describe a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ruyi_flow.config.topology import resolve_path
from ruyi_flow.config.yaml_files import explain, read_yaml
from ruyi_flow.errors import ConfigError

__all__ = ["Losses", "Recipe", "SelfDistill", "Source"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Model):
    """A file of training data, in one of the forms that `corpus.py` lists."""

    path: Path
    """The file; a relative path starts at the recipe's folder."""
    documents: int | None = Field(default=None, ge=1)
    """Most documents to read from the file. Default: all."""


class SelfDistill(_Model):
    """Self-distillation: answers of the family's last branch to prompts, which are training data besides `data`."""

    prompts: tuple[Source, ...] = ()
    """Files of chats. The last branch answers each anew: what precedes the answer at its end, or all of it if it ends
    with a message of the user."""
    own_prompts: int = Field(default=0, ge=0)
    """Number of further prompts that the family samples at temperature 1 from the beginning of a user's turn in its
    chat template (Magpie, Xu et al. 2024, arXiv 2406.08464). Duplicates and those longer than `max_new_tokens` are
    dropped. They are stored in `out` as `prompts.jsonl`."""
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = (0.0,)
    """Sampling temperatures. Every prompt is answered once at each; 0 is greedy."""
    max_new_tokens: int = Field(default=224, ge=1)
    """Most tokens of an answer, and of an own prompt."""
    batch: int = Field(default=64, ge=1)
    """Number of prompts that are answered at the same time."""

    @model_validator(mode="after")
    def _asks(self) -> SelfDistill:
        if not self.prompts and not self.own_prompts:
            raise ValueError("there is nothing to answer; set prompts: [{path: chats.jsonl}], or own_prompts: 5000")
        return self


class Losses(_Model):
    """Weights of the losses of scope `branches`."""

    kl: float = Field(default=1.0, ge=0)
    """Weight of the KL divergence from the last branch's distribution over its most probable tokens."""
    cross_entropy: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of the data's next token."""
    hidden: float = Field(default=1.0, ge=0)
    """Weight of the relative squared distance to the last branch's normed state, which needs no vocabulary logits."""
    positions: float = Field(default=1.0, gt=0, le=1)
    """Share of the positions for which `kl` and `cross_entropy` are computed."""
    vocabulary: Literal["candidates", "full"] = "candidates"
    """Tokens that a branch's distribution covers. `candidates`: those that are probable, or right, at any position of
    the batch. `full`: all."""
    prompt: float = Field(default=0.5, ge=0)
    """Weight of a position whose next token is outside of answers; one whose next token belongs to an answer has 1."""


class Recipe(_Model):
    """A training run, as described by its YAML file."""

    family: str
    """The family to train: a folder, or a name in the local store."""
    exits: tuple[int, ...] | None = None
    """Exits to give to an ordinary checkpoint."""
    out: Path
    """Folder for the result, the metrics and the state to resume from; relative paths start at the recipe's folder."""
    scope: Literal["branches", "joint", "probes"] = "branches"
    """Parts to train. `branches`: early branches on a frozen trunk. `joint`: trunk and branches. `probes`: probes."""
    branch_layers: dict[int, Annotated[int, Field(ge=1)]] = {}
    """Number of decoder layers of the branch at each exit. Default: as in the family."""
    probe_size: int = Field(default=32, ge=1, le=4096)
    """Hidden size of the probes, in scope `probes`."""
    start: Literal["copy", "zero"] = "copy"
    """Initial weights of a branch's new layers. `copy`: those of the trunk layers after its exit. `zero`: random, with
    output projections of zero (Ruyi2's DaE)."""
    data: tuple[Source, ...] = ()
    """Files to train on."""
    self_distill: SelfDistill | None = None
    """Answers to make with `ruyi-flow train --self-distill`. They are stored in `out`, and later runs train on them."""
    validation: float = Field(default=0.02, gt=0, lt=1)
    """Share of the packed sequences that is kept for validation."""
    length: int = Field(default=256, ge=8)
    """Tokens of a packed sequence."""
    batch: int = Field(default=16, ge=1)
    """Sequences of a batch, in each process."""
    accumulate: int = Field(default=1, ge=1)
    """Number of batches whose gradients are accumulated for one step, which then has the gradient of one large batch
    (except that `candidates` are those of each batch)."""
    steps: int = Field(ge=1)
    """Number of optimizer steps. It may change when a run is resumed; the learning rate then falls towards the new
    end."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate after the warm-up; it falls to a tenth along a cosine."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""
    clip: float = Field(default=1.0, gt=0)
    """Norm to which larger gradients are scaled down."""
    losses: Losses = Losses()
    """Weights of the losses, in scope `branches`."""
    exit_weights: Literal["decay", "equal"] = "decay"
    """Weights of the exits' losses, in scope `joint`. `decay`: those of early exits fall from 1 to 0.1. `equal`: all
    are 1 / number of exits."""
    precision: Literal["bf16", "no"] = "bf16"
    """Mixed precision of training; `no` computes in float32."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass, which saves memory."""
    cache_gb: float = Field(default=20.0, ge=0)
    """Most GB of disk for the cache of the frozen trunk's states, in scopes `branches` and `probes`."""
    validate_every: int = Field(default=200, ge=1)
    """Steps between validations."""
    save_every: int = Field(default=200, ge=1)
    """Steps between saves of the state to resume from."""
    seed: int = 0
    """Seed of the order of the data, of new layers' weights and of sampling."""

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a recipe.

        Raises:
            ConfigError: a key or a value is wrong; the error names the file, the key's path, the value and the fix.
        """
        path = Path(path)
        try:
            recipe = cls.model_validate(read_yaml(path, "recipe"))
        except ValidationError as error:
            raise ConfigError(explain(error, cls, str(path))) from None
        base = path.parent

        def placed(sources: tuple[Source, ...]) -> tuple[Source, ...]:
            return tuple(s.model_copy(update={"path": resolve_path(s.path, base, f"{path}: path")}) for s in sources)

        changes: dict[str, Any] = {"out": resolve_path(recipe.out, base, f"{path}: out"), "data": placed(recipe.data)}
        if (distill := recipe.self_distill) is not None:
            changes["self_distill"] = distill.model_copy(update={"prompts": placed(distill.prompts)})
        return recipe.model_copy(update=changes)

    def described(self) -> dict[str, Any]:
        """Return the recipe as JSON values to store with its result, with files' names instead of their paths."""

        def named(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(k): named(v) for k, v in value.items() if k != "out"}
            if isinstance(value, (list, tuple)):
                return [named(v) for v in value]
            return value.name if isinstance(value, Path) else value

        return dict(named(self.model_dump()))

    @property
    def answers(self) -> Path:
        """File of the family's own answers, which self-distillation writes."""
        return self.out / "answers.jsonl"
