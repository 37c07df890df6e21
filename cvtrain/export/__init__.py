"""Files to deploy; the `export` group."""

from cvtrain.export.base import Exporter, write_preprocess
from cvtrain.export.onnx import Onnx, export_onnx
from cvtrain.export.safetensors import Safetensors

__all__ = ["Exporter", "Onnx", "Safetensors", "export_onnx", "write_preprocess"]
