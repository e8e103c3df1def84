"""Small networks of every kind that the graph analysis has to understand, each with its example inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.n = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, 3)
        self.c = nn.Linear(12 * 9, 20)
        self.d = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.n(self.a(x))), 2)
        x = F.relu(self.b(F.pad(x, (0, 1, 0, 1))))
        return self.d(F.relu(self.c(x.flatten(1))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.n1 = nn.BatchNorm2d(16)
        self.b2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.n2 = nn.BatchNorm2d(16)
        self.f = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = F.relu(self.n1(self.b1(x)))
        y = self.n2(self.b2(y))
        y += x
        return self.f(F.relu(y).mean((2, 3)))


class PaddedResidual(nn.Module):
    """The parameter-free shortcut of CIFAR ResNets: subsample and pad channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.n = nn.BatchNorm2d(16)
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.f = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.n(self.b(x))
        x = (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + y).relu()
        return self.f((x + self.c(x)).relu().mean((2, 3)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.n1 = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.n2 = nn.BatchNorm2d(14)
        self.c = nn.Conv2d(14, 6, 3, padding=1)
        self.f = nn.Linear(20 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c(F.relu(self.n2(x)))], 1)
        return self.f(F.adaptive_avg_pool2d(x, 2).flatten(1))


class ChannelShuffle(nn.Module):
    """ShuffleNet's unit: grouped 1x1, shuffle, depthwise, grouped 1x1."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.a = nn.Conv2d(4, 16, 1)
        self.b = nn.Conv2d(16, 16, 1, groups=groups)
        self.n = nn.BatchNorm2d(16)
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.d = nn.Conv2d(16, 8, 1, groups=groups)
        self.f = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.b(self.a(x).relu()))
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.f(self.d(self.c(x)).relu().mean((2, 3)))


class SplitShuffle(nn.Module):
    """ShuffleNetV2: half of the channels pass, both halves are interleaved, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), nn.ReLU())
            for _ in range(2)
        )
        self.f = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        for branch in self.branches:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, branch(right)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.f(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.n = nn.BatchNorm2d(16)
        self.s1 = nn.Conv2d(16, 8, 1)
        self.s2 = nn.Conv2d(8, 16, 1)
        self.b = nn.Conv2d(16, 8, 3)
        self.f = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.a(x)).relu()
        x = x * self.s2(self.s1(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.f(self.b(x).relu().mean((2, 3)))


class BroadcastMultiply(nn.Module):
    """A spatial gate of one channel and a scale per channel: neither may tie channels with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.gate = nn.Conv2d(16, 1, 1)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.b = nn.Conv2d(16, 8, 3)
        self.f = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.f(self.b(x * self.gate(x).sigmoid() * self.scale).relu().mean((2, 3)))


class PixelShuffles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.up = nn.PixelShuffle(2)
        self.b = nn.Conv2d(8, 8, 3)
        self.down = nn.PixelUnshuffle(2)
        self.c = nn.Conv2d(32, 6, 1)
        self.f = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.up(self.a(x).relu())).relu()
        return self.f(self.c(self.down(x)).relu().mean((2, 3)))


class FusedAttention(nn.Module):
    """A transformer block with one linear layer for q, k and v, hard-coded reshapes, and a scale of its own."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.n1, self.qkv, self.o = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n2, self.m1, self.m2 = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)
        self.f = nn.Linear(width, 5)

    def attend(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.n1(x))
        x = x + self.m2(F.gelu(self.m1(self.n2(x))))
        return self.f(x.mean(1))


class KernelAttention(FusedAttention):
    """The same with PyTorch's fused attention, whose default scale depends on the width."""

    def attend(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.e, self.n1 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.d, self.n2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.p, self.n3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.f = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = F.relu6(self.n2(self.d(F.relu6(self.n1(self.e(x))))))
        return self.f((x + self.n3(self.p(y))).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(4, 12)
        self.c, self.f = nn.Linear(24, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u, v = self.a(x).relu(), self.b(y).relu()
        return self.f(self.c(torch.cat([u + v, u * v], 1)).relu())


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.f = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x).relu()
        return self.f(self.a(self.a(x).relu()).relu())


class Transposed(nn.Module):
    """Transposed convolutions: plain, grouped, depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.t = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.g = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4)
        self.w = nn.ConvTranspose2d(12, 12, 3, groups=12)
        self.b = nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.w(self.g(self.t(self.a(x).relu()).relu()).relu()).relu())


class Grouped(nn.Module):
    """Grouped convolutions, and a depthwise one with two outputs a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 8, 3, padding=1)
        self.g = nn.Conv1d(8, 12, 3, padding=1, groups=4)
        self.d = nn.Conv1d(12, 24, 3, padding=1, groups=12)
        self.b = nn.Conv1d(24, 6, 1)
        self.f = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.b(self.d(self.g(self.a(x).relu()).relu()).relu()).relu().mean(2))


class Pieces(nn.Module):
    """Ranges of one layer's channels read by different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 18, 3, padding=1)
        self.b, self.c = nn.Conv2d(6, 6, 1), nn.Conv2d(12, 6, 1)
        self.f = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        u, v = x.split([6, 12], 1)
        return self.f((self.b(u) + self.c(v) + self.b(x[:, 3:9])).relu().mean((2, 3)))


class Rolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.f(torch.roll(x, 3, -1) + self.b(x).flip(-1))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv3d(2, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True)
        self.b, self.f = nn.Conv3d(8, 8, 3, padding=1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.avg_pool3d(self.b(self.n(self.a(x)).relu()).relu(), (2, 3, 3)).flatten(1))


class Gated(nn.Module):
    """GLU, einsum, addmm, matrix products by plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.w, self.v = nn.Parameter(torch.randn(8, 10)), nn.Parameter(torch.randn(10, 12))
        self.f = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.a(x), -1) @ self.w
        return self.f(torch.einsum("nc,cd->nd", x.relu(), self.v).relu())


class NestedOutput(nn.Module):
    """A dict with a tuple inside comes out, and a constant buffer is added on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f = nn.Linear(6, 12), nn.Linear(12, 3)
        self.register_buffer("shift", torch.arange(12.0), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        y = self.f(self.a(x).relu() * (1 + self.shift))
        return {"y": y, "pair": (x, y.exp())}


class EmptySlice(nn.Module):
    """A mask of which a part has no length, as windows of a whole axis have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        mask = y.new_ones(4, 8)
        mask[0:-4, 2:6] = 0
        return self.b(y * mask[3])


class HeadsInTheBatch(nn.Module):
    """Heads are folded into the batch; one slice takes all of that axis, others begin or end inside of an axis or are open."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = nn.Linear(16, 8 * heads), nn.Linear(16, 8 * heads), nn.Linear(8 * heads, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, value = (layer(x).view(batch, length, self.heads, -1).transpose(1, 2).flatten(0, 1) for layer in (self.query, self.value))
        query, value = query[:, 1:], value[::1, :-1][:, -3:]
        mixed = (query.mean(1, keepdim=True)[:] + value).tanh()
        return self.out(mixed.view(batch, self.heads, 3, -1).transpose(1, 2).flatten(2)).mean(1)


class Modulated(nn.Module):
    """Every sample has a kernel of its own: a convolution in as many groups as the batch has samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.style, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(3, 8), nn.Linear(6, 2)
        self.kernel = nn.Parameter(0.1 * torch.randn(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        style = self.style(x.mean((2, 3))).sigmoid()
        kernels = (self.kernel * style[:, None, :, None, None]).reshape(-1, 8, 3, 3)
        y = nn.functional.conv2d(self.a(x).relu().reshape(1, -1, height, width), kernels, padding=1, groups=batch)
        return self.head(y.reshape(batch, -1, height, width).relu().mean((2, 3)))


class Auxiliary(nn.Module):
    """A second head that only training mode computes, on features in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.side, self.side_out, self.out = nn.Conv2d(8, 4, 1), nn.Linear(4 * 36, 2), nn.Linear(6 * 16, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.a(x).relu()
        z = self.out(self.b(y).relu().flatten(1))
        return (z, self.side_out(self.side(y).relu().flatten(1))) if self.training else z


IMAGE = ((3, 8, 8),)
CASES: dict[str, Case] = {
    "chain": (Chain, IMAGE),
    "residual": (Residual, IMAGE),
    "padded residual": (PaddedResidual, IMAGE),
    "dense block": (DenseBlock, IMAGE),
    "channel shuffle": (ChannelShuffle, ((4, 6, 6),)),
    "channel shuffle of four": (lambda: ChannelShuffle(4), ((4, 6, 6),)),
    "split shuffle": (SplitShuffle, IMAGE),
    "squeeze-excite": (SqueezeExcite, IMAGE),
    "broadcast multiply": (BroadcastMultiply, IMAGE),
    "pixel shuffle": (PixelShuffles, IMAGE),
    "fused attention": (FusedAttention, ((7, 16),)),
    "kernel attention": (KernelAttention, ((7, 16),)),
    "torch's encoder layer": (lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 3)), ((7, 16),)),
    "inverted residual": (InvertedResidual, IMAGE),
    "two inputs": (TwoInputs, ((6,), (4,))),
    "shared layer": (SharedLayer, ((6,),)),
    "transposed": (Transposed, IMAGE),
    "grouped": (Grouped, ((3, 9),)),
    "pieces": (Pieces, IMAGE),
    "rolled": (Rolled, ((6,),)),
    "volume": (Volume, ((2, 4, 6, 6),)),
    "gated": (Gated, ((6,),)),
    "nested output": (NestedOutput, ((6,),)),
    "heads in the batch": (HeadsInTheBatch, ((7, 16),)),
    "empty slice": (EmptySlice, ((6,),)),
    "auxiliary head": (Auxiliary, IMAGE),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model of a case in eval mode, with norms that have seen something, and a batch of three."""
    torch.manual_seed(seed)
    make, shapes = CASES[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model, tuple(torch.randn(3, *shape) for shape in shapes)
