"""Other tools that make a network int8 from the same inputs: ONNX Runtime's static quantizer, nncf, torchao."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from pared.core.errors import ModelError

Answers = Callable[[Tensor], Tensor]
"""From pixels, shape (batch, 3, height, width), to scores."""


def installed(package: str) -> str:
    """The version of a package, or nothing.

    >>> installed("no-such-package")
    ''
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def by_onnxruntime(original: Path, batches: Sequence[Tensor], file: Path) -> Path:
    """U8S8 by channel with ranges from extremes, as pared's own default: QDQ, weights of 7 bits."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Any:
            return next(({"input": batch.numpy()} for batch in self.left), None)

    prepared = file.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(file),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return file


def by_nncf(original: Path, batches: Sequence[Tensor], file: Path) -> Path:
    """nncf's post-training quantization of the same ONNX file, with its own defaults, run by ONNX Runtime.

    Raises:
        ModelError: if nncf isn't installed.
    """
    try:
        import nncf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError(f"lab.int8_against_peers compares with nncf, which can't be imported ({error}). Run: pip install nncf") from None
    with quiet():
        dataset = nncf.Dataset([{"input": batch.numpy()} for batch in batches])
        small = nncf.quantize(onnx.load(original), dataset, subset_size=len(batches))
    onnx.save(small, str(file))
    return file


def by_torchao(network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """torchao's pt2e quantization for x86 (reduced range), as its reference graph in PyTorch: simulated, not its kernels.

    It recognises layers by their class and leaves what it doesn't recognise in float, see `quantized_convolutions`.

    Raises:
        ModelError: if torchao isn't installed.
    """
    try:
        from torchao.quantization.pt2e.quantize_pt2e import (  # pyright: ignore[reportMissingImports]
            convert_pt2e,
            prepare_pt2e,
        )
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError(
            f"lab.int8_against_peers compares with torchao, which can't be imported ({error}). Run: pip install torchao"
        ) from None
    with quiet(), torch.no_grad():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        captured = torch.export.export(network.eval(), (batches[0],), dynamic_shapes=shapes).module()
        quantizer = x86_inductor_quantizer.X86InductorQuantizer()
        quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config(reduce_range=True))
        observed = prepare_pt2e(captured, quantizer)
        for batch in batches:
            observed(batch)
        return convert_pt2e(observed)


def quantized_convolutions(graph: Any) -> int:
    """How many convolutions of a graph by torchao have an int8 weight."""
    nodes = [node for node in graph.graph.nodes if "conv2d" in str(node.target)]
    return sum("dequantize" in str(node.args[1].target) for node in nodes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What other tools print and warn of is no part of a measurement."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


def versions() -> Mapping[str, str]:
    """Of all tools; nothing where one isn't installed."""
    return {package: installed(package) for package in ("onnxruntime", "nncf", "torchao", "torch")}


def top_one(scores: Tensor | np.ndarray) -> np.ndarray:
    """The class of every sample."""
    return np.asarray(scores).argmax(1)
