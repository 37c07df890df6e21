"""Which parameters train, as a function of the epoch; the `finetune` group."""

from __future__ import annotations

from torch import nn


class Full:
    """Every parameter trains from the first epoch."""

    def apply(self, model: nn.Module, epoch: int) -> bool:
        """Set `requires_grad` for `epoch`; return whether anything changed."""
        return False
