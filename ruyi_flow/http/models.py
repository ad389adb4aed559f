"""Names of models: the family, and the family with a way to decide its tokens.

`family` is answered as the topology's policy says, `family@exit-11` by one exit, `family@exact` by the last one with
drafts, `family@token` by the first confident one, and `family@NAME` by a policy file that the server was given.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError, RequestError, did_you_mean
from ruyi_flow.http.errors import HttpError
from ruyi_flow.http.fields import told
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.types import Mode

__all__ = ["Model", "Models"]

_THRESHOLD = 0.9
"""Confidence that `family@token` needs where the topology's policy has none."""

_OF_A_MODE = frozenset({"mode", "exit", "threshold", "thresholds", "window", "back"})
"""The options of a request that say how tokens are decided, instead of the model's name."""

_POLICY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Model:
    """A name that clients may ask for, and what it means."""

    id: str
    """The name."""
    options: Mapping[str, Any]
    """The routing options that it stands for."""
    policy: PolicyFile | None = None
    """The policy file that it stands for, if it does."""

    def routing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return routing options: those of a request over those of this name.

        A request that says how tokens are decided replaces all that the name says about it.

        Raises:
            RequestError: the options do not fit the policy file.
        """
        of_a_mode = _OF_A_MODE & given.keys()
        if self.policy is not None and of_a_mode <= {"mode"}:
            return self.policy.options(given)
        if not of_a_mode or (of_a_mode == {"mode"} and given["mode"] == self.options.get("mode")):
            return {**self.options, **given}
        return dict(given)


class Models:
    """The models of a topology.

    Args:
        topology: the topology.
        policies: policy files by name.

    Raises:
        ConfigError: a policy's name cannot be one, or it does not fit the topology's exits.
    """

    def __init__(self, topology: Topology, policies: Mapping[str, Path] | None = None) -> None:
        self.created = int(time.time())
        self.family = Path(topology.family).name
        exits = topology.all_exits
        routing = topology.routing()
        has_thresholds = routing.mode is Mode.TOKEN
        token = {"mode": "token"} if has_thresholds else {"mode": "token", "threshold": _THRESHOLD}
        named: dict[str, Model] = {}
        for name, options in [
            *((f"exit-{p}", {"mode": "fixed", "exit": p}) for p in exits),
            ("token", token),
            ("exact", {"mode": "exact"}),
        ]:
            named[name] = Model(f"{self.family}@{name}", options)
        for name, file in (policies or {}).items():
            if name in named or not _POLICY_NAME.fullmatch(name):
                raise ConfigError(
                    f"--policy {name}={file}: the name must be letters, digits, '.', '_' and '-', and none of "
                    f"{', '.join(named)}"
                )
            policy = PolicyFile.load(file)
            try:
                Policy.resolve(Routing().updated(policy.options({})), exits)
            except RequestError as error:
                raise ConfigError(f"--policy {name}={file}: {error}") from None
            named[name] = Model(f"{self.family}@{name}", {}, policy)
        self._models = {model.id: model for model in (Model(self.family, {}), *named.values())}

    @property
    def ids(self) -> list[str]:
        """The names, the family's first."""
        return list(self._models)

    def find(self, name: str) -> Model:
        """Return the model of a name.

        Raises:
            HttpError: there is none.
        """
        if (model := self._models.get(name)) is not None:
            return model
        raise HttpError(
            404,
            f"the model {told(name)} does not exist; this server has {', '.join(self.ids)}"
            f"{did_you_mean(name[:200], self.ids)}",
            param="model",
            code="model_not_found",
        )

    def listing(self, name: str, context: int | None) -> dict[str, Any]:
        """Return a model as OpenAI's API lists it.

        Args:
            name: the model's name.
            context: the family's context in tokens, if it is known.

        Raises:
            HttpError: there is no such model.
        """
        entry = {"id": self.find(name).id, "object": "model", "created": self.created, "owned_by": "ruyi-flow"}
        return entry if context is None else {**entry, "max_model_len": context}
