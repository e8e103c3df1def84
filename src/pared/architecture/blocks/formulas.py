"""Parameters, MACs and sizes of single layers, from which those of the blocks are summed."""

from __future__ import annotations


def conv_parameters(inputs: int, outputs: int, kernel: int, *, groups: int = 1, bias: bool = False) -> int:
    """Parameters of a square convolution: kernel² · inputs · outputs / groups, and a bias for each output.

    Args:
        inputs: channels, a multiple of `groups`.
        outputs: channels, a multiple of `groups`.
        kernel: side of the kernel.
        groups: each output sees inputs / groups channels; `inputs` of them make the convolution depthwise.
        bias: off, because batch normalisation has its own.

    >>> conv_parameters(240, 60, 1), conv_parameters(240, 60, 1, groups=3)
    (14400, 4800)
    """
    return kernel * kernel * inputs * outputs // groups + bias * outputs


def conv_macs(inputs: int, outputs: int, kernel: int, size: int, *, groups: int = 1) -> int:
    """MACs of a square convolution for one picture: its weights times the pixels of its output; biases aren't counted, as in the papers.

    Args:
        inputs: channels.
        outputs: channels.
        kernel: side of the kernel.
        size: side of the output in pixels.
        groups: of the channels.

    >>> conv_macs(2, 4, 3, 5)
    1800
    """
    return conv_parameters(inputs, outputs, kernel, groups=groups) * size * size


def norm_parameters(channels: int) -> int:
    """Parameters of batch normalisation: a scale and a shift for each channel. It counts no MACs: it folds into the convolution.

    >>> norm_parameters(64)
    128
    """
    return 2 * channels


def out_size(size: int, kernel: int, stride: int = 1, *, padding: int | None = None, ceil: bool = False) -> int:
    """Side of the output of a convolution or a pooling; less than 1 where the input is too small.

    Args:
        size: side of the input in pixels.
        kernel: side of the window.
        stride: step of the window.
        padding: on each side. None: kernel // 2, which keeps the size at stride 1 and an odd kernel.
        ceil: True lets a last window hang over the edge, as SqueezeNet's poolings do.

    >>> out_size(109, 3, 2, padding=0), out_size(54, 3, 2, padding=0), out_size(54, 3, 2, padding=0, ceil=True)
    (54, 26, 27)
    """
    pad = kernel // 2 if padding is None else padding
    room = size + 2 * pad - kernel
    steps = -(-room // stride) if ceil else room // stride
    # a window must begin inside the input or its left padding
    return steps if ceil and steps * stride >= size + pad else steps + 1
