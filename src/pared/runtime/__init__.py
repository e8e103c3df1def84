"""Deployed files: exporting to ONNX, and the engine that runs them."""

from pared.runtime.engine import Engine as Engine
from pared.runtime.engine import load as load
from pared.runtime.export import ExportsItself as ExportsItself
from pared.runtime.export import export as export
from pared.runtime.export import model_proto as model_proto
from pared.runtime.export import named_proto as named_proto
from pared.runtime.saturation import saturates as saturates
