"""Small files: `.pared` holds any ONNX model or safetensors file, losslessly, entropy-coded tensor by tensor. FORMAT.md has the bytes."""

from pared.codec.container import PackedFile as PackedFile
from pared.codec.packing import Inspection as Inspection
from pared.codec.packing import Stored as Stored
from pared.codec.packing import inspect as inspect
from pared.codec.packing import pack as pack
from pared.codec.packing import to_onnx as to_onnx
from pared.codec.packing import unpack as unpack
