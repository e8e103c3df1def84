"""Whether the engine's integer kernels lose what doesn't fit 16 bits, which decides how many bits int8 weights may have."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from pared.runtime.engine import session_options

_DEPTH, _COLUMNS = 64, 16


@functools.cache
def saturates() -> bool:
    """Whether products of unsigned and signed bytes saturate in ONNX Runtime on this processor.

    Processors with AVX2 or AVX-512 but without VNNI add two such products in 16 bits (vpmaddubsw): 2 · 255 · 127 is cut off at 32,767.
    It isn't looked up but tried: a product of the largest bytes is computed once in a process, which takes a few milliseconds.

    >>> isinstance(saturates(), bool)
    True
    """
    weight = numpy_helper.from_array(np.full((_DEPTH, _COLUMNS), 127, np.int8), "weight")
    node = helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    values = [
        helper.make_tensor_value_info(name, kind, [None, None]) for name, kind in (("x", TensorProto.UINT8), ("y", TensorProto.INT32))
    ]
    graph = helper.make_graph([node], "saturation", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, _DEPTH), 255, np.uint8)})
    return bool((np.asarray(found) != 255 * 127 * _DEPTH).any())
