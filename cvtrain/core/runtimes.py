"""Names of what can run an artifact; torch-free."""

from __future__ import annotations

TORCH = "torch"
"""A .safetensors of weights, loaded into the network that its metadata describe."""
ONNXRUNTIME = "onnxruntime"
TORCH_EXPORT = "torch.export"
TORCHSCRIPT = "torchscript"
OPENVINO = "openvino"
TENSORRT = "tensorrt"
RUNTIMES = (TORCH, ONNXRUNTIME, TORCH_EXPORT, TORCHSCRIPT, OPENVINO, TENSORRT)
