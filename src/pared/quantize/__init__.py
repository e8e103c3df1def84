"""Fewer bits: int8 weights and activations, weights that share their values."""

from pared.quantize.adaround import adaround as adaround
from pared.quantize.affine import affine_range as affine_range
from pared.quantize.affine import choose_qparams as choose_qparams
from pared.quantize.affine import quantize_weight as quantize_weight
from pared.quantize.bit_allocation import bit_errors as bit_errors
from pared.quantize.bit_allocation import choose_bits as choose_bits
from pared.quantize.bits import Bits as Bits
from pared.quantize.clusters import Clusters as Clusters
from pared.quantize.equalization import equalize as equalize
from pared.quantize.gptq import gptq as gptq
from pared.quantize.grid import Grid as Grid
from pared.quantize.grid import clip_activation as clip_activation
from pared.quantize.grid import dorefa_integers as dorefa_integers
from pared.quantize.grid import fake_quantize as fake_quantize
from pared.quantize.grid import find_grid as find_grid
from pared.quantize.int8 import Int8 as Int8
from pared.quantize.integers import Integers as Integers
from pared.quantize.kmeans import initial_centroids as initial_centroids
from pared.quantize.kmeans import kmeans as kmeans
from pared.quantize.kmeans import nearest as nearest
from pared.quantize.kmeans import optimal_kmeans as optimal_kmeans
from pared.quantize.rate import Rate as Rate
from pared.quantize.rate_cost import cost_of as cost_of
from pared.quantize.rounding import Rounding as Rounding
from pared.quantize.row_rounding import round_to_nearest as round_to_nearest
from pared.quantize.row_rounding import row_scales as row_scales
