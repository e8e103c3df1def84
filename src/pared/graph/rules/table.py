"""Which rule serves which ATen operator, and what happens to an operator that has none."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from pared.graph.labels import Labels, groups_in
from pared.graph.passes import Pass
from pared.graph.regions import MARKS
from pared.graph.rules import norms, products, recurrent, shapes

Rule = Callable[..., Any]

_NAMES: dict[Rule, str] = {
    shapes.same: """alias clone contiguous detach dropout feature_dropout alpha_dropout native_dropout lift_fresh lift_fresh_copy bernoulli
        to _to_copy type_as float half double bfloat16 positive fill_ zero_ conj resolve_conj resolve_neg requires_grad_
        feature_alpha_dropout bernoulli_ normal_ uniform_ rand_like zeros_like ones_like full_like empty_like randn_like""",
    shapes.size: """sym_size sym_numel sym_stride sym_storage_offset _assert_tensor_metadata _assert_scalar _assert_async
        sym_constrain_range""",
    shapes.view: "view reshape _unsafe_view",
    shapes.unflatten: "unflatten",
    shapes.flatten: "flatten reshape_as view_as ravel",
    shapes.squeeze: "squeeze",
    shapes.unsqueeze: "unsqueeze",
    shapes.permute: "permute",
    shapes.transpose: "transpose swapaxes swapdims t",
    shapes.matrix_transpose: "mT mH adjoint numpy_T",
    shapes.movedim: "movedim moveaxis",
    shapes.cat: "cat concat concatenate",
    shapes.stack: "stack",
    shapes.split: "split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split",
    shapes.unbind: "unbind",
    shapes.select_index: "select",
    shapes.slice_range: "slice",
    shapes.narrow: "narrow",
    shapes.pad: "pad constant_pad_nd",
    shapes.roll: "roll",
    shapes.flip: "flip",
    shapes.expand: "expand broadcast_to",
    shapes.expand_as: "expand_as",
    shapes.constant: "zeros ones full empty new_zeros new_ones new_full new_empty",
    shapes.repeat: "repeat tile",
    shapes.repeat_interleave: "repeat_interleave",
    shapes.pixel_shuffle: "pixel_shuffle",
    shapes.pixel_unshuffle: "pixel_unshuffle",
    shapes.channel_shuffle: "channel_shuffle native_channel_shuffle",
    shapes.image_to_columns: "im2col",
    shapes.unfold: "unfold",
    shapes.index: "index",
    shapes.index_select: "index_select",
    shapes.embedding: "embedding",
    products.linear: "linear",
    products.convolution: "conv1d conv2d conv3d",
    products.transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
    products.matmul: "matmul mm bmm mv dot",
    products.added_matmul: "addmm baddbmm",
    products.einsum: "einsum",
    products.attention: "scaled_dot_product_attention",
    recurrent.lstm: "lstm",
    recurrent.gru: "gru",
    recurrent.rnn: "rnn_tanh rnn_relu",
    recurrent.lstm_cell: "lstm_cell",
    recurrent.gru_cell: "gru_cell",
    recurrent.rnn_cell: "rnn_tanh_cell rnn_relu_cell",
    norms.batch_norm: "batch_norm instance_norm",
    norms.layer_norm: "layer_norm rms_norm",
    norms.group_norm: "group_norm",
    norms.softmax: "softmax log_softmax _softmax _log_softmax",
    norms.along: "cumsum cumprod argsort logcumsumexp",
    norms.glu: "glu",
    norms.total: "sum nansum",
    norms.mean: "mean",
    norms.spread: "var std",
    norms.spread_and_mean: "var_mean std_mean",
    norms.extreme: "amax amin argmax argmin max min median",
    norms.vector_norm: "linalg_vector_norm norm",
    norms.pool: """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_bicubic2d
        upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d""",
    norms.prelu: "prelu",
    norms.elementwise: """add sub mul div rsub true_divide floor_divide remainder fmod pow maximum minimum where masked_fill lerp addcmul
        addcdiv atan2 logical_and logical_or logical_xor logical_not eq ne lt le gt ge bitwise_and bitwise_or bitwise_not bitwise_xor
        relu relu6 gelu silu sigmoid tanh hardsigmoid hardswish hardtanh leaky_relu elu selu celu mish softplus softsign logsigmoid
        log_sigmoid threshold hardshrink softshrink tanhshrink clamp clamp_min clamp_max clip exp expm1 log log1p log2 sqrt rsqrt
        square abs neg sign sin cos tan erf erfc ceil floor round trunc reciprocal nan_to_num isnan isinf isfinite copy_ rrelu
        _weight_norm multiply divide subtract fake_quantize_per_tensor_affine""",
}


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {operator.getitem: shapes.getitem, **dict.fromkeys(MARKS, shapes.size)}
    for rule, names in _NAMES.items():
        for name in names.split():
            for form in (name, f"{name}_"):
                if hasattr(torch.ops.aten, form):
                    table[getattr(torch.ops.aten, form)] = rule
    return table


RULES: dict[Any, Rule] = _table()


def rule_for(target: Any) -> Rule | None:
    """The rule of a node's target; a pointwise operator without a rule of its own is elementwise; None if unknown."""
    packet = getattr(target, "overloadpacket", target)
    if packet in RULES:
        return RULES[packet]
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise in tags:
        return norms.elementwise
    return None


def unknown(cx: Pass, *arguments: Any, **named: Any) -> Any:
    """An operator without a rule: everything it touches stays as it is."""
    for group in groups_in([arguments, list(named.values())]):
        cx.freeze(group.atoms, f"goes through {cx.node.target}, which isn't followed")
    return unlabelled(cx.shape())


def unlabelled(shape: Any) -> Any:
    """Labels of fixed lengths for a recorded shape or a list of them; other values pass."""
    if isinstance(shape, list):
        return [unlabelled(entry) for entry in shape]
    return Labels(tuple(shape)) if isinstance(shape, tuple) else shape
