"""Deployed files that are made in a millisecond: one linear layer in ONNX, with metadata."""

import json

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cvtrain.core.artifact import Artifact
from cvtrain.core.types import Preprocess


def described(names, preprocess, **more):
    """The metadata of a deployed file."""
    return {"class_names": json.dumps(list(names)), "preprocess": json.dumps(preprocess.to_dict()), **more}


def write_linear(path, weight, bias, metadata, batch=None, name="onnx", exact=True, embed=False):
    """Write `weight @ picture + bias` for normalised float pictures; `embed`: uint8 in, softmax out."""
    (classes, _), prep = weight.shape, Preprocess.from_dict(json.loads(metadata["preprocess"]))
    side = prep.resize if embed else prep.img_size
    kind = onnx.TensorProto.UINT8 if embed else onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Flatten", ["images"], ["flat"], axis=1)]
    if embed:
        nodes += [helper.make_node("Cast", ["flat"], ["floats"], to=onnx.TensorProto.FLOAT)]
    nodes += [helper.make_node("Gemm", ["floats" if embed else "flat", "weight", "bias"], ["logits"], transB=1)]
    if embed:
        nodes += [helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", kind, [batch or "batch", prep.channels, side, side])],
        [helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, [batch or "batch", classes])],
        [
            numpy_helper.from_array(np.asarray(values, dtype=np.float32), key)
            for key, values in (("weight", weight), ("bias", bias))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {**metadata, **({"embedded": "true"} if embed else {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return Artifact(name, path, "onnxruntime", weight.size, weight.size, exact=exact)
