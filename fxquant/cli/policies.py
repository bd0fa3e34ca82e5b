"""The command ``policies``, and the policy of a command line."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxquant import policies
from fxquant.cli.arguments import PRESET_OPTIONS, budget_of
from fxquant.errors import PolicyError
from fxquant.policies.policy import Policy
from fxquant.policies.policy_file import resolve, to_yaml


def policy_of(options: Namespace) -> Policy:
    """The policy that ``--policy`` names, a preset with the options of the command line.

    Raises:
        PolicyError: there is none of that name, or it does not take an option.
    """
    values = _preset_options(options)
    if policies.takes(options.policy, "budget"):
        values["budget"] = budget_of(options)
    if all(value is None for value in values.values()):
        return resolve(options.policy)
    if Path(options.policy).suffix in (".yaml", ".yml"):
        names = ", ".join(f"--{k.replace('_', '-')}" for k, v in values.items() if v is not None)
        raise PolicyError(
            f"{names} are for presets; {options.policy} has its own widths and rules",
            got=options.policy,
        )
    return policies.preset(options.policy, **values)


def _preset_options(options: Namespace) -> dict[str, Any]:
    return {key: getattr(options, key) for key in PRESET_OPTIONS}


def run_policies(options: Namespace) -> int:
    """``fxquant policies``: lists the presets, or prints one."""
    if options.name is None:
        width = max(map(len, policies.PRESETS))
        for name, make in policies.PRESETS.items():
            print(f"{name:{width}}  {make().description}")
    elif options.describe:
        policies.preset(options.name)
        make_one: Callable[..., object] = policies.PRESETS[options.name]
        print(f"{options.name}{inspect.signature(make_one)}\n\n{inspect.getdoc(make_one)}")
    else:
        print(to_yaml(policies.preset(options.name, **_preset_options(options))), end="")
    return 0
