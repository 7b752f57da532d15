"""Ways of learning task after task (`continual.method`), one file each, and what they share."""

from strategies.continual import baselines, ewc, input_aware, o_lora, subspace
from strategies.continual.way import Way

__all__ = ["WAYS"]

WAYS: dict[str, Way] = {way.name: way for way in (input_aware.WAY, subspace.WAY, o_lora.WAY, ewc.WAY, *baselines.WAYS)}
