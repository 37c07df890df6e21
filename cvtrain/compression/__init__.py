"""Pruning and quantization; the `compression` group."""

from cvtrain.compression.prune import PruneUnstructured
from cvtrain.compression.ptq import PtqStatic
from cvtrain.compression.steps import check_order, run_steps

__all__ = ["PruneUnstructured", "PtqStatic", "check_order", "run_steps"]
