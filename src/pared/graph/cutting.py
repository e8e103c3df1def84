"""Cut a model: the only code that changes shapes.

The model is copied, captured and analysed; a choice of neurons is followed through the graph; parameters are gathered and literals
changed. The result keeps the user's class when its own forward, with attributes repaired, computes what the rewritten graph computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pared.core.errors import ModelError
from pared.graph.analysis import Analysis, analyse
from pared.graph.analysis_pass import Note, attribute
from pared.graph.capture import Captured, buffers_put_back, one_sample_more, training_mode
from pared.graph.classes import CutClass, Grid
from pared.graph.cut_pass import CutPass
from pared.graph.labels import Atoms, groups_in
from pared.graph.layers import rewritten_with_layers
from pared.graph.passes import Emptied, Violation
from pared.graph.repair import repair_integers, repair_leaves
from pared.graph.rewritten import Rewritten
from pared.graph.tracing import trace_or_capture
from pared.graph.training_graph import Kept, auxiliary_cuts, cut_training_graph, switched_to_training

Choice = Callable[[Analysis], list[int]]


@dataclass(frozen=True)
class Cut:
    """A cut model and what was done to it.

    Attributes:
        model: the result; a module of the user's class if `own_class`, else a `Rewritten` graph.
        own_class: whether the user's own forward could be kept.
        kept: for every parameter and buffer that changed, by name: the indices kept of each axis that lost some.
        left_alone: why some chosen neurons stayed after all.
    """

    model: nn.Module
    own_class: bool
    kept: dict[str, dict[int, tuple[int, ...]]]
    left_alone: tuple[str, ...]


def cut_model(model: nn.Module, example_inputs: Tensor | Sequence[Any], choose: Choice, leave: tuple[str, ...] = ()) -> Cut:
    """Remove the neurons that `choose` picks from a copy of `model`.

    Args:
        model: any module that `capture` accepts; unchanged.
        example_inputs: a tensor or a tuple.
        choose: gets the analysis and returns the roots to remove; called again where a first choice can't be followed.
        leave: module paths whose outputs keep their width.

    Raises:
        ModelError, CaptureError: as `capture`.
        SettingsError: if `leave` names no module.
    """
    own = copy.deepcopy(model)
    captured = trace_or_capture(own, example_inputs)
    plan, notes = follow(analyse(captured, leave), choose)
    names = _names(own, captured)
    kept = {
        name: {axis: tuple(map(int, index)) for axis, index in plan.kept[value].items()}
        for value, found in names.items()
        if value in plan.kept
        for name in found
    }
    if not kept:
        return Cut(own, True, {}, notes)
    new = _new_tensors(captured, plan)
    unread = _unread(own, captured)
    auxiliary = auxiliary_cuts(model, captured.example_inputs, _kept(captured, plan), captured.dynamic, unread)
    for name, (tensor, index) in auxiliary.items():
        parameter = own.get_parameter(name)
        new[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
        kept[name] = {axis: tuple(map(int, left)) for axis, left in index.items()}
    evaluation = edited_graph(captured.module, plan)
    parts, saved = parts_of(own, captured, new), set(own.state_dict())
    rewritten = Rewritten(parts, evaluation, switched_to_training(evaluation), saved)
    result = _own_class(own, names, new, captured, plan, rewritten)
    if result is None:
        training = _training_graph(model, captured, plan, evaluation)
        result = rewritten_with_layers(own, parts, (evaluation, training), saved, plan.edits)
        if not agree(result, rewritten, captured):
            result = Rewritten(parts, evaluation, training, saved)
    match_training(result, model)
    return Cut(result, result is own, kept, notes)


def follow(analysis: Analysis, choose: Choice) -> tuple[CutPass, tuple[str, ...]]:
    """Find a choice that the graph can follow: where one can't be followed, align rows; where that fails too, leave the class alone."""
    aligned: set[int] = set()
    notes: list[str] = []
    for _ in range(1000):
        removed = choose(analysis)
        try:
            return CutPass(analysis, removed).run(), tuple(notes)
        except Emptied as emptied:
            first = emptied.atoms.reshape(-1)[:1]
            analysis = analysis.refined(frozen=(Note(first, "is the last index of an axis", emptied.node),))
        except Violation as violation:
            touched = _classes_at(analysis, violation.node, removed)
            fresh = [index for index in touched if analysis.classes[index].grids and analysis.classes[index].neurons[0] not in aligned]
            if fresh:
                ties = []
                for index in fresh:
                    aligned.add(analysis.classes[index].neurons[0])
                    ties += _aligned(analysis.classes[index].grids)
                analysis = analysis.refined(ties=tuple(ties))
            else:
                frozen = []
                for index in touched:
                    found = analysis.classes[index]
                    why = f"can't be followed at {violation}"
                    notes.append(f"{found.name}: {why}")
                    frozen.append(Note(np.array(found.neurons), why, violation.node))
                analysis = analysis.refined(frozen=tuple(frozen))
    raise ModelError("the cut could not be followed through the graph")


def _classes_at(analysis: Analysis, node: fx.Node, removed: list[int]) -> list[int]:
    """The classes that lose neurons and reach a node; all that lose some, if none reaches it."""
    near = [analysis.labels.get(place) for place in (node, *node.all_input_nodes)]
    here = {root for group in groups_in(near) for root in analysis.root[group.atoms].reshape(-1).tolist()}
    gone = set(removed)
    losing = [index for index, found in enumerate(analysis.classes) if gone & _members(found)]
    return [index for index in losing if here & _members(analysis.classes[index])] or losing


def _members(found: CutClass) -> set[int]:
    return set(found.neurons).union(*(grid.members for grid in found.grids))


def _aligned(grids: tuple[Grid, ...]) -> list[tuple[Atoms, Atoms]]:
    """Tie the rows of every grid position by position, so that all rows lose the same positions."""
    return [(matrix[0], row) for grid in grids for matrix in grid.matrices for row in matrix[1:]]


def _names(own: nn.Module, captured: Captured) -> dict[int, list[str]]:
    """All names of every tensor of the model, by identity."""
    names: dict[int, list[str]] = {}
    tensors = [*own.named_parameters(remove_duplicate=False), *own.named_buffers(remove_duplicate=False)]
    known = {name for name, _ in tensors}
    for node in captured.module.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in known and isinstance(value := attribute(node), Tensor):
            tensors.append((str(node.target), value))
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    return names


def _new_tensors(captured: Captured, plan: CutPass) -> dict[int, Tensor]:
    """The cut value of every tensor that changes; parameters stay parameters."""
    new: dict[int, Tensor] = {}
    for node in captured.module.graph.nodes:
        if node.op == "get_attr" and isinstance(value := attribute(node), Tensor) and id(value) in plan.gathers and id(value) not in new:
            cut = _laid_out_like(value, plan.gathers[id(value)](value.detach()))
            new[id(value)] = nn.Parameter(cut, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else cut
    return new


def _laid_out_like(value: Tensor, cut: Tensor) -> Tensor:
    """`cut` in the memory format of `value`: a network that was put in channels_last stays so."""
    for dimensions, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if value.dim() == dimensions and not value.is_contiguous() and value.is_contiguous(memory_format=layout):
            return cut.contiguous(memory_format=layout)
    return cut


def edited_graph(module: fx.GraphModule, plan: CutPass) -> fx.Graph:
    """A copy of the graph with the literals of the cut."""
    graph = fx.Graph()
    graph.set_codegen(module.graph._codegen)
    twins: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and not isinstance(attribute(node), Tensor | nn.Module):
            continue
        if "_assert_tensor_metadata" in str(node.target):
            continue  # it states the old sizes
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda old: twins[old]))
            continue
        twin = twins[node] = graph.node_copy(node, lambda old: twins[old])
        for name, value in plan.edits.get(node, {}).items():
            _edit(twin, name, value, twins)
    graph.lint()
    return graph


def _edit(twin: fx.Node, name: int | str, value: Any, twins: dict[fx.Node, fx.Node]) -> None:
    value = fx.map_arg(value, lambda old: twins[old])
    if name == "target":
        twin.target = value
    elif name == "args":
        twin.args, twin.kwargs = tuple(value), {}
    elif isinstance(name, int):
        twin.args = (*twin.args[:name], value, *twin.args[name + 1 :])
    else:
        twin.kwargs = {**twin.kwargs, name: value}


def parts_of(own: nn.Module, captured: Captured, new: dict[int, Tensor]) -> dict[str, Tensor | nn.Module]:
    """All tensors of the cut network under the user's names, and what only the graph knows: constants, subgraphs."""
    parts: dict[str, Tensor | nn.Module] = {}
    for name, tensor in (*own.named_parameters(remove_duplicate=False), *own.named_buffers(remove_duplicate=False)):
        parts[name] = new.get(id(tensor), tensor)
    for node in captured.module.graph.nodes:
        if node.op == "get_attr" and isinstance(value := attribute(node), Tensor | nn.Module):
            parts.setdefault(str(node.target), new.get(id(value), value) if isinstance(value, Tensor) else value)
    return parts


def _kept(captured: Captured, plan: CutPass) -> Kept:
    """What stays of every tensor that the graph reads and the plan cuts, by name."""
    sources = [(str(node.target), id(attribute(node))) for node in captured.module.graph.nodes if node.op == "get_attr"]
    return {name: plan.kept[value] for name, value in sources if value in plan.kept}


def _unread(own: nn.Module, captured: Captured) -> frozenset[str]:
    """Parameters that the eval graph never reads."""
    read = {id(attribute(node)) for node in captured.module.graph.nodes if node.op == "get_attr" and node.users}
    return frozenset(name for name, parameter in own.named_parameters(remove_duplicate=False) if id(parameter) not in read)


def _training_graph(model: nn.Module, captured: Captured, plan: CutPass, evaluation: fx.Graph) -> fx.Graph:
    """The graph of training mode over the same tensors."""
    found = cut_training_graph(model, captured.example_inputs, _kept(captured, plan), captured.dynamic)
    if found is not None:
        graph = edited_graph(found[1], found[0])
        known = {str(node.target) for node in evaluation.nodes if node.op == "get_attr"} | {name for name, _ in model.named_buffers()}
        if all(str(node.target) in known for node in graph.nodes if node.op == "get_attr"):
            return graph
    return switched_to_training(evaluation)


def _own_class(
    own: nn.Module, names: dict[int, list[str]], new: dict[int, Tensor], captured: Captured, plan: CutPass, rewritten: Rewritten
) -> nn.Module | None:
    """The user's module over the cut tensors, if its forward then computes the same; else None."""
    for value, tensor in new.items():
        for name in names.get(value, []):
            if not _assign(own, name, tensor):
                return None
    repair_leaves(own, plan.edits)
    if agree(own, rewritten, captured):
        return own
    undo = repair_integers(own, plan.edits)
    if agree(own, rewritten, captured):
        return own
    undo()
    return None


def _assign(own: nn.Module, name: str, tensor: Tensor) -> bool:
    """Replace a parameter, buffer or plain tensor attribute; False if the model has nothing under that name."""
    path, _, leaf = name.rpartition(".")
    try:
        module = own.get_submodule(path) if path else own
    except AttributeError:
        return False
    for store in (module._parameters, module._buffers, module.__dict__):
        if isinstance(store.get(leaf), Tensor):
            store[leaf] = tensor  # type: ignore[assignment]
            return True
    return False


def agree(own: nn.Module, rewritten: nn.Module, captured: Captured) -> bool:
    """Whether both compute the same outputs on the example and on a batch of one more."""
    batches = [captured.example_inputs]
    if captured.dynamic:
        batches.append(one_sample_more(captured.example_inputs))
    for batch in batches:
        left, right = _outputs(own, batch), _outputs(rewritten, batch)
        if left is None or right is None:
            if left is right and batch is not batches[0]:
                continue  # neither takes another batch size
            return False
        if len(left) != len(right) or not all(_close(a, b) for a, b in zip(left, right, strict=True)):
            return False
    return True


def _outputs(model: nn.Module, batch: tuple[Any, ...]) -> list[Any] | None:
    """The leaves of a model's outputs in eval mode, or None where it raises. What the forward writes into buffers is taken back."""
    try:
        with torch.no_grad(), training_mode(model, False), buffers_put_back(model):
            return pytree.tree_leaves(model(*copy.deepcopy(batch)))
    except Exception:
        return None


def _close(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return left == right
    if left.shape != right.shape:
        return False
    scale = max(float(right.abs().max()) if right.numel() else 0.0, 1e-6) if right.is_floating_point() else 1.0
    return bool(torch.allclose(left, right, rtol=1e-4, atol=1e-5 * scale, equal_nan=True))


def match_training(result: nn.Module, model: nn.Module) -> None:
    """The result is in the mode that the model is in; modules of the same path keep their own flag."""
    result.train(model.training)
    flags = {path: module.training for path, module in model.named_modules()}
    for path, module in result.named_modules():
        module.training = flags.get(path, model.training)
