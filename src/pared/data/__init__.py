"""Data sets as tasks."""

from pared.data.batches import Batches as Batches
from pared.data.cifar10 import cifar10 as cifar10
from pared.data.digits import digits as digits
from pared.data.fashion_mnist import fashion_mnist as fashion_mnist
from pared.data.folder import image_folder as image_folder
from pared.data.load import load as load
from pared.data.mnist_10k import mnist_10k as mnist_10k
from pared.data.transforms import CropAndFlip as CropAndFlip
from pared.data.transforms import Normalize as Normalize
