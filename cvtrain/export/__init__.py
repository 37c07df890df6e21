"""Files to deploy; the `export` group."""

from cvtrain.export.base import Exporter, write_preprocess
from cvtrain.export.onnx import Onnx, export_onnx
from cvtrain.export.openvino import OpenVINO
from cvtrain.export.safetensors import Safetensors
from cvtrain.export.tensorrt import TensorRT
from cvtrain.export.torch_export import TorchExport
from cvtrain.export.torchscript import TorchScript

__all__ = [
    "Exporter",
    "Onnx",
    "OpenVINO",
    "Safetensors",
    "TensorRT",
    "TorchExport",
    "TorchScript",
    "export_onnx",
    "write_preprocess",
]
