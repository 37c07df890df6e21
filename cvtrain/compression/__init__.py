"""Pruning and quantization; the `compression` group."""

from cvtrain.compression.dynamic import PtqDynamic
from cvtrain.compression.prune import PruneUnstructured
from cvtrain.compression.ptq import PtqStatic
from cvtrain.compression.qat import Qat
from cvtrain.compression.steps import Chain, artifact_file
from cvtrain.compression.structured import PruneStructured

__all__ = ["Chain", "PruneStructured", "PruneUnstructured", "PtqDynamic", "PtqStatic", "Qat", "artifact_file"]
