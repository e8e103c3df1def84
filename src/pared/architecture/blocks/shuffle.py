"""Channel shuffle: what lets grouped convolutions exchange what they know (ShuffleNet; Zhang et al. 2018, 1707.01083, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers


def channel_shuffle(images: Tensor, groups: int) -> Tensor:
    """Deal the channels of each group to all groups: channel j of group i goes to place j · groups + i.

    Shuffling with `groups` and then with channels / groups gives the channels back in their first order.

    Args:
        images: shape (batch, channels, height, width); `channels` must be a multiple of `groups`.
        groups: of the convolution before.

    Returns:
        The same shape.

    >>> import torch
    >>> channel_shuffle(torch.arange(6).view(1, 6, 1, 1), 2).flatten().tolist()
    [0, 3, 1, 4, 2, 5]
    """
    batch, channels, height, width = images.shape
    return images.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ChannelShuffle(nn.Module):
    """`channel_shuffle` as a module.

    Args:
        groups: of the convolution before.

    Raises:
        SettingsError: if `groups` isn't a whole number of at least 1.

    >>> ChannelShuffle(3)
    ChannelShuffle(groups=3)
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        whole_numbers("ChannelShuffle", groups=groups).raise_if_any()
        self.groups = groups

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        return channel_shuffle(images, self.groups)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"groups={self.groups}"
