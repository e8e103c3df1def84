"""Networks of the papers. All take the keywords `classes`, `channels`, `size` (side in pixels) and `width` (a factor)."""

from pared.architecture.nets.conv import conv2, conv4, conv6
from pared.architecture.nets.ghost_net import ghostnet
from pared.architecture.nets.lenet import lenet5, lenet300
from pared.architecture.nets.mobilenet import mobilenet_v1, mobilenet_v2
from pared.architecture.nets.mobilenet3 import mobilenet_v3_large, mobilenet_v3_small
from pared.architecture.nets.resnet import resnet8, resnet20, resnet32, resnet56, resnet110
from pared.architecture.nets.shufflenet import shufflenet_v1, shufflenet_v2
from pared.architecture.nets.squeezenet import squeezenet1_0, squeezenet1_1
from pared.architecture.nets.vgg import vgg16, vgg_small
from pared.architecture.nets.xception_net import xception

__all__ = [
    "conv2",
    "conv4",
    "conv6",
    "ghostnet",
    "lenet5",
    "lenet300",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "shufflenet_v1",
    "shufflenet_v2",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg16",
    "vgg_small",
    "xception",
]
