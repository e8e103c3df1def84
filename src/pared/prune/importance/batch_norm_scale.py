"""The scale that batch normalisation gives a neuron."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from pared.core.problems import Problems
from pared.graph.analysis import Analysis
from pared.graph.analysis_pass import attribute
from pared.graph.labels import Labels
from pared.prune.importance.protocol import Normalize, Scores, check_choice
from pared.prune.importance.sums import with_magnitude
from pared.prune.observe import operator_name
from pared.training import Task


@dataclass(frozen=True)
class BatchNormScale:
    """|γ| of the batch norms that a neuron goes through, summed over tied layers (Network Slimming, Liu et al., 1708.06519).

    The paper trains with an L1 penalty on γ first; without one the scales say less. A class with neurons that no batch norm scales is
    ranked by `Magnitude`.

    Args:
        normalize: "none" by default, as the paper ranks γ of all layers together: each multiplies values of unit variance. "layer"
            divides by the mean of a class.

    Raises:
        SettingsError: if a setting is out of range.

    >>> BatchNormScale().normalize
    'none'
    """

    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = Problems("importance.batch_norm_scale")
        check_choice(problems, "normalize", self.normalize, "layer", "none")
        problems.raise_if_any()

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Add up the scales; needs no data."""
        scores, known = np.zeros(analysis.first.count), np.zeros(analysis.first.count, bool)
        for node, labels in analysis.labels.items():
            if operator_name(node) not in ("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"):
                continue
            source = node.args[1] if len(node.args) > 1 else None
            group = labels.on(1 if labels.rank > 1 else 0) if isinstance(labels, Labels) else None
            if isinstance(source, fx.Node) and source.op == "get_attr" and group is not None and len(group.axes) == 1:
                scale: Tensor = attribute(source).detach()
                np.add.at(scores, analysis.root[group.atoms], scale.abs().double().cpu().numpy())
                known[analysis.root[group.atoms]] = True
        return with_magnitude(analysis, scores, known, self.normalize)
