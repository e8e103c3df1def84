"""Reference networks of the papers. All take the keywords `classes`, `channels`, `size` (side in pixels) and `width` (a factor)."""

from pared.architecture.nets.conv import conv2, conv4, conv6
from pared.architecture.nets.lenet import lenet5, lenet300
from pared.architecture.nets.resnet import resnet8, resnet20, resnet32, resnet56, resnet110
from pared.architecture.nets.vgg import vgg16, vgg_small

__all__ = [
    "conv2",
    "conv4",
    "conv6",
    "lenet5",
    "lenet300",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "vgg16",
    "vgg_small",
]
