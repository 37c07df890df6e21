"""What quantization did to each layer of an ONNX file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Operators that only move values about: what they give is as exact as what they get.
_MOVES = frozenset(
    (
        *("Concat", "Flatten", "Gather", "GatherElements", "MaxPool", "Pad", "Reshape"),
        *("Resize", "Slice", "Split", "Squeeze", "TopK", "Transpose", "Unsqueeze"),
    )
)
# What ONNX Runtime appends to names.
_WEIGHT_SUFFIX, _GRAPH_OUTPUT_SUFFIX = "_quantized", "_QuantizeLinear_Input"


@dataclass(frozen=True)
class WeightError:
    """How far the 8-bit numbers of a weight are from the float ones.

    Attributes:
        weight_scale_min: Smallest scale of a channel; the only one where the whole weight has one.
        weight_scale_max: Largest one.
        weight_zero_point: The number that stands for 0.
        weight_mean_error: Mean absolute difference.
        weight_max_error: Largest absolute difference.
        weight_snr_db: 10 log10 of the power of the weight by that of the difference.
    """

    weight_scale_min: float
    weight_scale_max: float
    weight_zero_point: int
    weight_mean_error: float
    weight_max_error: float
    weight_snr_db: float


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer that computes with 8-bit numbers; None where it has no such thing.

    Attributes:
        layer: Name of the module whose weight it has; without a weight that of its node.
        kind: Operator of ONNX: `Conv`, `Gemm`, `Add`.
        node: Name of its node in the graph.
        weight: Error of its weight.
        output_scale: Scale of its output's 8-bit numbers.
        output_zero_point: The number that stands for 0 in its output.
        output_snr_db: 10 log10 of the power of its output by that of the error, where this layer alone is INT8.
    """

    layer: str
    kind: str
    node: str
    weight: WeightError | None = None
    output_scale: float | None = None
    output_zero_point: int | None = None
    output_snr_db: float | None = None

    def row(self, int8: bool = True) -> dict[str, Any]:
        """Return the layer as a row of a table, with "" for None; `int8`: it was not left in float after all."""
        values = {
            "layer": self.layer,
            "kind": self.kind,
            "int8": int8,
            **(asdict(self.weight) if self.weight else dict.fromkeys(WeightError.__dataclass_fields__)),
            "output_scale": self.output_scale,
            "output_zero_point": self.output_zero_point,
            "output_snr_db": self.output_snr_db,
        }
        return {key: "" if value is None else value for key, value in values.items()}


class Graph:
    """An ONNX file with what has to be looked up in it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self.model = onnx.load(path)
        self.nodes = self.model.graph.node

    @cached_property
    def producers(self) -> dict[str, Any]:
        """The node that gives each value."""
        return {output: node for node in self.nodes for output in node.output}

    @cached_property
    def rounded_by(self) -> dict[str, Any]:
        """The node that makes 8-bit numbers of a value."""
        return {node.input[0]: node for node in self.nodes if node.op_type == "QuantizeLinear"}

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The stored tensors by name."""
        return {entry.name: entry for entry in self.model.graph.initializer}

    def array(self, name: str) -> NDArray[Any]:
        """Return a stored tensor."""
        from onnx import numpy_helper

        values: NDArray[Any] = numpy_helper.to_array(self.constants[name])
        return values


def quantized_layers(float_path: Path, int8_path: Path, pictures: NDArray[np.float32]) -> list[QuantizedLayer]:
    """Compare a file of quantize and dequantize nodes with the float file it was made of.

    The error of a layer's output is its own: it gets the float network's activations, rounds them and computes with
    its rounded weight, so that what the layers before it did wrong is not counted again.

    Args:
        float_path: The float file.
        int8_path: The INT8 file, with every layer quantized that can be.
        pictures: `(B, C, H, W)` float32; run one by one, so that few activations are held.

    Returns:
        The layers that compute, in the graph's order; those that only move values are left out.
    """
    floats, int8 = Graph(float_path), Graph(int8_path)
    kinds = set(quantizable()) - _MOVES  # others may get restored numbers, too, but compute in float
    nodes = [node for node in int8.nodes if node.op_type in kinds and _gets_numbers(node, int8)]
    noise = _output_snr(floats, int8, nodes, pictures)
    return [_describe(node, floats, int8, snr) for node, snr in zip(nodes, noise, strict=True)]


def weight_error(
    weight: NDArray[np.float32], quantized: NDArray[Any], scale: NDArray[Any], zero_point: NDArray[Any], axis: int
) -> WeightError:
    """Compare a weight with its 8-bit numbers.

    Args:
        weight: The float weight.
        quantized: The numbers, of its shape.
        scale: One value, or one for each channel.
        zero_point: As many.
        axis: Axis of the channels.
    """
    shape = [1] * weight.ndim
    shape[axis] = -1
    restored = (quantized.astype(np.float64) - zero_point.reshape(shape)) * scale.astype(np.float64).reshape(shape)
    difference = np.abs(restored - weight)
    return WeightError(
        weight_scale_min=float(scale.min()),
        weight_scale_max=float(scale.max()),
        weight_zero_point=int(zero_point.flat[0]),
        weight_mean_error=float(difference.mean()),
        weight_max_error=float(difference.max()),
        weight_snr_db=_decibels(_power(weight), _power(difference)),
    )


def layer_name(floats: Graph, node: str, weight: str) -> str:
    """Return the name of the module that a layer of a float graph was made of.

    Args:
        floats: The float graph.
        node: Name of the layer's node.
        weight: Name of its weight; one that the exporter has turned around has lost its own, its bias has not.
    """
    outputs = {output for each in floats.nodes if each.name == node for output in each.output}
    behind = [name for each in floats.nodes if each.op_type == "Add" and outputs & {*each.input} for name in each.input]
    for name in (weight, *behind):
        if name in floats.constants and name.endswith(("weight", "bias")):
            return str(name).removesuffix("weight").removesuffix("bias").rstrip("._")
    return weight


def quantizable() -> list[str]:
    """Return the operators that ONNX Runtime can compute in INT8, as its `quantize_static` chooses them."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def _gets_numbers(node: Any, int8: Graph) -> bool:  # noqa: ANN401 - onnx.NodeProto of a lazy import
    return any(_is_restored(name, int8) for name in node.input)


def _is_restored(name: str, int8: Graph) -> bool:
    return name in int8.producers and int8.producers[name].op_type == "DequantizeLinear"


def _describe(node: Any, floats: Graph, int8: Graph, snr: float) -> QuantizedLayer:  # noqa: ANN401 - onnx.NodeProto
    layer, error = str(node.name), None
    for name in filter(lambda each: _is_restored(each, int8), node.input):
        restored = int8.producers[name]
        stored = restored.input[0].removesuffix(_WEIGHT_SUFFIX)
        # Not the bias, which has the scale of what it is added to: its INT32 numbers lose nothing.
        if stored in floats.constants and int8.array(restored.input[0]).dtype == np.int8:
            axis = next((entry.i for entry in restored.attribute if entry.name == "axis"), 0)
            numbers, scale, zero_point = (int8.array(part) for part in restored.input)
            layer = layer_name(floats, node.name, stored)
            error = weight_error(floats.array(stored), numbers, scale, zero_point, axis)
            break
    rounding = int8.rounded_by.get(node.output[0])
    return QuantizedLayer(
        layer=layer,
        kind=node.op_type,
        node=node.name,
        weight=error,
        output_scale=float(int8.array(rounding.input[1]).flat[0]) if rounding is not None else None,
        output_zero_point=int(int8.array(rounding.input[2]).flat[0]) if rounding is not None else None,
        output_snr_db=snr,
    )


def _output_snr(floats: Graph, int8: Graph, nodes: Sequence[Any], pictures: NDArray[np.float32]) -> list[float]:
    """Return decibels for each of `nodes`, computed from the float network's activations."""
    import onnx
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(floats.model)
    probe.graph.initializer.extend(int8.constants[name] for name in int8.constants if name not in floats.constants)
    pairs = []
    for number, node in enumerate(nodes):
        added, pair = _beside(node, int8, f"layer{number}/")
        probe.graph.node.extend(added)
        pairs.append(pair)
    del probe.graph.output[:]
    shown = sorted({name for pair in pairs for name in pair})
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Optimized, the two branches of a layer would not stay apart.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    power = np.zeros((len(pairs), 2))
    for picture in pictures:
        values = dict(zip(shown, session.run(shown, {source.name: picture[None]}), strict=True))
        power += [(_power(values[exact]), _power(values[exact] - values[rounded])) for exact, rounded in pairs]
    return [_decibels(signal, noise) for signal, noise in power]


def _beside(node: Any, int8: Graph, prefix: str) -> tuple[list[Any], tuple[str, str]]:  # noqa: ANN401 - onnx.NodeProto
    """Return nodes that compute one layer in INT8 from the float network's values, and the names of both outputs."""
    added: list[Any] = []
    own: set[str] = set()

    def add(original: Any) -> None:  # noqa: ANN401 - onnx.NodeProto
        copied = type(original)()
        copied.CopyFrom(original)
        copied.name = prefix + original.name
        copied.input[:] = [prefix + i if i in own else i.removesuffix(_GRAPH_OUTPUT_SUFFIX) for i in original.input]
        copied.output[:] = [prefix + o if o else o for o in original.output]
        own.update(original.output)
        added.append(copied)

    for name in node.input:
        if name in own or not _is_restored(name, int8):
            continue
        restoring = int8.producers[name]
        if restoring.input[0] in int8.producers:
            add(int8.producers[restoring.input[0]])
        add(restoring)
    add(node)
    rounding = int8.rounded_by.get(node.output[0])
    if rounding is not None:
        add(rounding)
        add(next(each for each in int8.nodes if rounding.output[0] in each.input))
    return added, (node.output[0].removesuffix(_GRAPH_OUTPUT_SUFFIX), added[-1].output[0])


def _power(values: NDArray[Any]) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _decibels(signal: float, noise: float) -> float:
    """Return their ratio; infinite without any noise, even of a signal that is 0."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
