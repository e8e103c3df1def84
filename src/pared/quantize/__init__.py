"""Fewer bits: int8 weights and activations."""

from pared.quantize.affine import affine_range as affine_range
from pared.quantize.affine import choose_qparams as choose_qparams
from pared.quantize.affine import quantize_weight as quantize_weight
from pared.quantize.int8 import Int8 as Int8
