"""Dynamic quantization of linear layers to INT8 by ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from cvtrain.compression.quantize import check_runs, counted, in_words, save_as, write_artifact
from cvtrain.compression.quantize_report import Graph, QuantizedLayer, layer_name, weight_error
from cvtrain.compression.steps import artifact_file
from cvtrain.core.artifact import Compressed, CompressionContext
from cvtrain.errors import CvtrainError

_WHERE = "compression.ptq_dynamic"


class PtqDynamic:
    """Quantize the weights of linear layers to 8 bits, and what they get in each batch by its own range.

    Needs no calibration pictures and loses little where static ranges do not fit, as in transformers. Convolutions stay
    in float: ONNX Runtime computes them slower with ranges found on the fly than without.
    """

    label = "int8d"

    def __init__(self, per_channel: bool = True, reduce_range: bool = False) -> None:
        """Take the settings.

        Args:
            per_channel: One weight scale for each output channel instead of one a tensor.
            reduce_range: 7-bit weights, which cannot overflow on CPUs without VNNI.
        """
        self.per_channel = per_channel
        self.reduce_range = reduce_range

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Export `model` and write the file with INT8 linear layers.

        Args:
            model: On the CPU; never changed.
            name: Name of the artifact.
            context: Uses `export_onnx`, `example` and `folder`.

        Returns:
            The `.onnx` file and a row for each linear layer. No model: the next step works on the float one.

        Raises:
            CvtrainError: The model has no linear layer, or ONNX Runtime cannot quantize it or run what it wrote.
        """
        path = context.folder / artifact_file(name, ".onnx")
        with tempfile.TemporaryDirectory(dir=context.folder, prefix=".int8d.tmp-") as temporary:
            work = Path(temporary).resolve()
            context.export_onnx(model, work / "float.onnx")
            with in_words(_WHERE):
                _as_products(work / "float.onnx", work / "products.onnx")
                self._quantize(work / "products.onnx", work / "raw.onnx")
                layers, weights = _layers(Graph(work / "products.onnx"), Graph(work / "raw.onnx"))
            if not layers:
                raise CvtrainError(
                    f"{_WHERE}: the model has no linear layer, and dynamic quantization knows nothing else.\n"
                    "Use compression=[ptq_static], which quantizes convolutions, or leave ptq_dynamic out."
                )
            with in_words(_WHERE):
                import onnx

                save_as(onnx.load(work / "raw.onnx"), work / "int8.onnx", work / "float.onnx")
            check_runs(_WHERE, work / "int8.onnx", context.example)
            share = weights / max(1, sum(parameter.numel() for parameter in model.parameters()))
            note = f"dynamic INT8 of {counted(len(layers), 'linear layer')} with {share:.0%} of the weights"
            note += ", the rest is float"
            artifact = write_artifact(name, path, work / "int8.onnx", model, context, note)
        return Compressed((artifact,), layers=tuple(layer.row() for layer in layers))

    def _quantize(self, source: Path, target: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["MatMul"],
            per_channel=self.per_channel,
            reduce_range=self.reduce_range,
            weight_type=QuantType.QInt8,
        )


def _as_products(source: Path, target: Path) -> None:
    """Write linear layers as products with stored weights, the only form that the quantizer takes.

    The exporter leaves the large weights of attention's projections behind Transpose nodes, and those of other layers
    for Gemm to turn around; turned here they keep their names, which ONNX Runtime's own way does not from 1.32 on.
    """
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = onnx.load(source)
    graph = model.graph
    constants = {entry.name: entry for entry in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in constants]:
        order = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
        turned = numpy_helper.to_array(constants[node.input[0]]).transpose(order)
        graph.initializer.append(numpy_helper.from_array(turned.copy(), node.output[0]))
        graph.node.remove(node)
    for node in graph.node:
        turn = next((entry for entry in node.attribute if entry.name == "transB" and entry.i), None)
        if node.op_type == "Gemm" and turn is not None and uses[node.input[1]] == 1 and node.input[1] in constants:
            stored = constants[node.input[1]]
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).T.copy(), stored.name))
            turn.i = 0
    plain = ONNXModel(model)
    plain.replace_gemm_with_matmul()
    del graph.value_info[:]  # the exporter notes the shapes of stored weights too, which are others now
    onnx.save(plain.model, target)


def _layers(floats: Graph, int8: Graph) -> tuple[list[QuantizedLayer], int]:
    """Return a row for each product of 8-bit numbers, and how many weights they have."""
    layers: list[QuantizedLayer] = []
    weights = 0
    for node in int8.nodes:
        if node.op_type != "MatMulInteger":
            continue
        stored = node.input[1].removesuffix("_quantized")
        values = floats.array(stored)
        numbers, scale = int8.array(node.input[1]), int8.array(f"{stored}_scale")
        zero_point: Any = int8.array(node.input[3])
        error = weight_error(values, numbers, scale, zero_point, axis=values.ndim - 1)
        name = layer_name(floats, node.name.removesuffix("_quant"), stored)
        layers.append(QuantizedLayer(name, "MatMul", node.name, error))
        weights += values.size
    return layers, weights
