"""The presets: functions that return a :class:`fxquant.Policy`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fxquant.config.effort import Effort
from fxquant.errors import PolicyError, UnknownPresetError
from fxquant.policies.policy import Policy
from fxquant.policies.presets.best import best
from fxquant.policies.presets.plain import minmax, w8a8, w8a8_full
from fxquant.policies.presets.searched import base_ptq, mptq_vit, ptq4vit
from fxquant.policies.presets.shared_rules import elementwise_rules, end_rules
from fxquant.policies.presets.trained import aiqvit
from fxquant.utils.suggest import did_you_mean

__all__ = [
    "PRESETS",
    "Effort",
    "aiqvit",
    "base_ptq",
    "best",
    "elementwise_rules",
    "end_rules",
    "minmax",
    "mptq_vit",
    "preset",
    "ptq4vit",
    "w8a8",
    "w8a8_full",
]

PRESETS: dict[str, Callable[..., Policy]] = {
    "best": best,
    "w8a8": w8a8,
    "w8a8_full": w8a8_full,
    "minmax": minmax,
    "base_ptq": base_ptq,
    "ptq4vit": ptq4vit,
    "mptq_vit": mptq_vit,
    "aiqvit": aiqvit,
}


def preset(name: str, **options: Any) -> Policy:
    """The policy of a preset.

    Args:
        name: name of the preset.
        **options: options of the preset; an option that is None stays at its default.

    Raises:
        UnknownPresetError: there is no such preset; the message names the nearest.
        PolicyError: the preset does not have an option.
    """
    if name not in PRESETS:
        raise UnknownPresetError(
            f"no preset {name!r}{did_you_mean(name, PRESETS)}; there are {', '.join(PRESETS)}. "
            "compile takes policy files as well, which must exist and end in .yaml or .yml",
            got=name,
            expected=tuple(PRESETS),
        )
    chosen = {key: value for key, value in options.items() if value is not None}
    for key in chosen:
        takers = [preset_name for preset_name in PRESETS if takes(preset_name, key)]
        if name not in takers:
            parameters = inspect.signature(PRESETS[name]).parameters
            verb = "takes" if len(takers) == 1 else "take"
            hint = f": {', '.join(takers)} {verb} it" if takers else did_you_mean(key, parameters)
            raise PolicyError(
                f"preset {name} has no {key}{hint}", got=key, expected=tuple(parameters)
            )
    return PRESETS[name](**chosen)


def takes(name: str, option: str) -> bool:
    """Whether a preset exists and has an option."""
    return name in PRESETS and option in inspect.signature(PRESETS[name]).parameters
