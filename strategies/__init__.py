"""Published federated methods, one file each; importing the package registers them in `strategies.base.METHODS`."""

from strategies import (
    fed_sb,
    fedex_lora,
    fedit,
    fedsa_lora,
    fedsvd,
    ffa_lora,
    flexlora,
    flora,
    frlora,
    hetlora,
    lora_fair,
    rolora,
)

__all__ = [
    "fed_sb",
    "fedex_lora",
    "fedit",
    "fedsa_lora",
    "fedsvd",
    "ffa_lora",
    "flexlora",
    "flora",
    "frlora",
    "hetlora",
    "lora_fair",
    "rolora",
]
