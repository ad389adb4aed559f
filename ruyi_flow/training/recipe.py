"""Recipes: what a training run is to do, as YAML files say it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ruyi_flow.config.yaml_files import explain, read_yaml
from ruyi_flow.errors import ConfigError

__all__ = ["Losses", "Recipe", "SelfDistill", "Source"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Model):
    """A file to train on; `corpus.py` says of which kinds."""

    path: Path
    documents: int | None = Field(default=None, ge=1)
    """At most this many of it."""


class SelfDistill(_Model):
    """Answers that the family's last branch gives to the prompts of chats, to train on beside the data."""

    prompts: tuple[Source, ...] = ()
    """Chats; the last turn of each is answered anew."""
    own_prompts: int = Field(default=0, ge=0)
    """So many more that the family writes itself, at temperature 1, where its chat template opens a user's turn
    (Magpie, Xu et al. 2024, arXiv 2406.08464); those that do not end in `max_new_tokens`, or are there already, are
    left out. They are kept in `out`, as `prompts.jsonl`."""
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = (0.0,)
    """Every prompt is answered once at each; 0 is greedy."""
    max_new_tokens: int = Field(default=224, ge=1)
    """Of an answer."""
    batch: int = Field(default=64, ge=1)
    """Prompts at once."""

    @model_validator(mode="after")
    def _asks(self) -> SelfDistill:
        if not self.prompts and not self.own_prompts:
            raise ValueError("say what is to be answered: prompts: [{path: chats.jsonl}], or own_prompts: 5000")
        return self


class Losses(_Model):
    """What a branch is trained for, in scope `branches`; each with its weight."""

    kl: float = Field(default=1.0, ge=0)
    """Divergence from the last branch's distribution over its likeliest tokens."""
    cross_entropy: float = Field(default=0.0, ge=0)
    """Of the text's own next token."""
    hidden: float = Field(default=1.0, ge=0)
    """Squared distance of the normed state to the last branch's, relative to its size; costs no vocabulary product."""
    positions: float = Field(default=1.0, gt=0, le=1)
    """Share of the positions that take part in `kl` and `cross_entropy`."""
    vocabulary: Literal["candidates", "full"] = "candidates"
    """`candidates`: the branch's distribution is over the tokens that are likely, or right, anywhere in the batch."""
    prompt: float = Field(default=0.5, ge=0)
    """Weight of positions that are not in an answer."""


class Recipe(_Model):
    """A training run, as its YAML file says it."""

    family: str
    """A folder, or a name in the local store."""
    exits: tuple[int, ...] | None = None
    """The exits to give to an ordinary checkpoint."""
    out: Path
    """Folder for the result, the metrics, and the state to resume from."""
    scope: Literal["branches", "joint", "probes"] = "branches"
    branch_layers: dict[int, Annotated[int, Field(ge=1)]] = {}
    """Layers of the branch at each exit; what the family has where not named."""
    probe_size: int = Field(default=32, ge=1, le=4096)
    """Scope `probes`: their width."""
    start: Literal["copy", "zero"] = "copy"
    """Further layers of a branch start as copies of the trunk layers after its exit, or (Ruyi2's DaE) random with
    output projections of zero."""
    data: tuple[Source, ...] = ()
    self_distill: SelfDistill | None = None
    """Done by `ruyi-flow train --self-distill`; the answers are kept in `out`, and every later run trains on them."""
    validation: float = Field(default=0.02, gt=0, lt=1)
    """Share of the packed sequences that is never trained on."""
    length: int = Field(default=256, ge=8)
    """Tokens of a packed sequence."""
    batch: int = Field(default=16, ge=1)
    """Sequences of a step and process."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients make one update."""
    steps: int = Field(ge=1)
    """Updates. A run that is there already may go on with another number: the learning rate falls towards that."""
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a gradient."""
    losses: Losses = Losses()
    exit_weights: Literal["decay", "equal"] = "decay"
    """Scope `joint`: early exits' weights fall from 1 to 0.1, or all are 1 / G."""
    precision: Literal["bf16", "no"] = "bf16"
    gradient_checkpointing: bool = False
    cache_gb: float = Field(default=20.0, ge=0)
    """Disk for what the trunk gives, in scope `branches`."""
    validate_every: int = Field(default=200, ge=1)
    save_every: int = Field(default=200, ge=1)
    seed: int = 0

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a recipe.

        Raises:
            ConfigError: with the file, the key's path, the value and the fix.
        """
        path = Path(path)
        try:
            recipe = cls.model_validate(read_yaml(path, "recipe"))
        except ValidationError as error:
            raise ConfigError(explain(error, cls, str(path))) from None
        base = path.parent

        def placed(sources: tuple[Source, ...]) -> tuple[Source, ...]:
            return tuple(s.model_copy(update={"path": base / s.path.expanduser()}) for s in sources)

        changes: dict[str, Any] = {"out": base / recipe.out.expanduser(), "data": placed(recipe.data)}
        if (distill := recipe.self_distill) is not None:
            changes["self_distill"] = distill.model_copy(update={"prompts": placed(distill.prompts)})
        return recipe.model_copy(update=changes)

    def described(self) -> dict[str, Any]:
        """What went into a run, for whoever gets its result: files by name, not by where they lay."""

        def named(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(k): named(v) for k, v in value.items() if k != "out"}
            if isinstance(value, (list, tuple)):
                return [named(v) for v in value]
            return value.name if isinstance(value, Path) else value

        return dict(named(self.model_dump()))

    @property
    def answers(self) -> Path:
        """Where self-distillation keeps the family's own answers."""
        return self.out / "answers.jsonl"
