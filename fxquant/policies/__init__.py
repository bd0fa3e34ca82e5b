"""The presets. Each is a function that returns a Policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from fxquant.errors import PolicyError, UnknownPresetError
from fxquant.policies.plain import minmax, w8a8, w8a8_full
from fxquant.policies.searched import base_ptq, mptq_vit, ptq4vit
from fxquant.policies.trained import aiqvit
from fxquant.policy import Policy
from fxquant.suggest import did_you_mean

__all__ = [
    "PRESETS",
    "aiqvit",
    "base_ptq",
    "minmax",
    "mptq_vit",
    "preset",
    "ptq4vit",
    "w8a8",
    "w8a8_full",
]

PRESETS: dict[str, Callable[..., Policy]] = {
    "w8a8": w8a8,
    "w8a8_full": w8a8_full,
    "minmax": minmax,
    "base_ptq": base_ptq,
    "ptq4vit": ptq4vit,
    "mptq_vit": mptq_vit,
    "aiqvit": aiqvit,
}


def preset(name: str, *, weight_bits: int | None = None, act_bits: int | None = None) -> Policy:
    """The preset of that name, with its default options but for the widths given.

    Raises:
        UnknownPresetError: there is none; the message names the nearest.
        PolicyError: it has its own fixed widths.
    """
    if name not in PRESETS:
        raise UnknownPresetError(
            f"no preset {name!r}{did_you_mean(name, PRESETS)}; there are {', '.join(PRESETS)}. "
            "A policy file must exist and end in .yaml or .yml"
        )
    given = {"weight_bits": weight_bits, "act_bits": act_bits}
    widths = {key: bits for key, bits in given.items() if bits is not None}
    if widths and not set(widths) <= set(inspect.signature(PRESETS[name]).parameters):
        takers = [
            n for n, make in PRESETS.items() if "act_bits" in inspect.signature(make).parameters
        ]
        raise PolicyError(f"preset {name} has fixed widths; {', '.join(takers)} take any")
    return PRESETS[name](**widths)
