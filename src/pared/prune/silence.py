"""Residual blocks that add nothing and can go without a trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pared.graph.capture import Captured
from pared.graph.depth import Block
from pared.graph.silence import node_values
from pared.prune.groups import branch_weights


def silent_blocks(captured: Captured, blocks: Sequence[Block]) -> list[Block]:
    """The residual blocks whose branch adds nothing: all its weights are zero, and so is what comes out; a choice for `shorten`."""
    values = node_values(captured)
    found = []
    for block in blocks:
        weights = branch_weights(captured, block)
        if weights and not any(weight.any() for weight in weights) and torch.equal(values[block.end], values[block.start]):
            found.append(block)
    return found
