"""Multiply-adds of an ONNX graph's convolutions and linear layers, from the shapes that onnx infers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Shape = tuple[int, ...]


def layer_flops(model: Any, inputs: Sequence[Shape]) -> int:
    """Multiply-adds of every node that multiplies by a weight, for inputs of these shapes.

    Args:
        model: an `onnx.ModelProto`.
        inputs: the shape of each graph input, batch first.
    """
    graph = _with_shapes(model, inputs)
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    weights = _constants(graph, set(shapes))
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    total = 0
    for node in graph.node:
        if any(name in weights for name in node.input[:2]):
            total += _node_flops(node, [shapes.get(name, ()) for name in node.input], shapes.get(node.output[0], ()))
    return total


def _node_flops(node: Any, inputs: list[Shape], output: Shape) -> int:
    if node.op_type == "Conv":  # every output is a sum over the weight's inputs and kernel
        return math.prod(output) * math.prod(inputs[1][1:])
    if node.op_type == "ConvTranspose":  # every input meets the weight's outputs and kernel
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if node.op_type == "MatMul":
        return math.prod(output) * inputs[0][-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(output) * inputs[0][0 if transposed else -1]
    return 0


def _with_shapes(model: Any, inputs: Sequence[Shape]) -> Any:
    """The graph with the shape of every value, worked out from these inputs alone."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for value, shape in zip(copy.graph.input, inputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dim.Clear()
            dim.dim_value = size
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(copy, data_prop=True).graph


def _constants(graph: Any, names: set[str]) -> set[str]:
    """Initializers, and what is made of them alone, such as a transposed weight."""
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(name in names for name in node.input if name)):
            names.update(node.output)
    return names
