"""Published federated methods, one file each; importing the package registers them in `strategies.base.METHODS`."""

from strategies import fedit, ffa_lora, flora

__all__ = ["fedit", "ffa_lora", "flora"]
