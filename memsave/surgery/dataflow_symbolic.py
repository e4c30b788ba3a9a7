"""The dataflow of a forward by symbolic tracing: no inputs, and true for all of them.

``torch.fx`` cannot follow a forward that decides by its input's shape or values. Then its parts
are traced one by one: what holds inside a block's forward holds whoever calls the block.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from memsave.surgery.dataflow import FORWARD_ERRORS, Call, Dataflow, Value, is_leaf

__all__ = ["symbolic_dataflows", "symbolic_parts"]


def symbolic_dataflows(model: nn.Module, prefix: str = "") -> list[Dataflow]:
    """Return the dataflow of ``model`` in training and in evaluation, names under ``prefix``.

    Raises what the forward raises on symbols, ``torch.fx``'s errors among it.
    """
    names = {id(module): _join(prefix, name) for name, module in model.named_modules()}
    flags = [(module, module.training) for module in model.modules()]
    flows = []
    try:
        for training in (True, False):
            for module, flag in flags:
                module.training = flag if flag != flags[0][1] else training  # frozen ones stay
            with torch.no_grad():
                graph = _Tracer().trace(model)
            flows.append(_dataflow(graph, model, names, prefix))
    finally:
        for module, flag in flags:
            module.training = flag
    return flows


def symbolic_parts(model: nn.Module, prefix: str = "") -> list[list[Dataflow]]:
    """Return the dataflows of the largest parts of ``model`` that can be traced."""
    if is_leaf(model):
        return []
    try:
        return [symbolic_dataflows(model, prefix)]
    except FORWARD_ERRORS:
        parts = []
        for name, child in model.named_children():
            parts += symbolic_parts(child, _join(prefix, name))
        return parts


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return is_leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """A symbol that tells ``y += x`` from ``y = y + x``, as fx's own does not."""

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


def _dataflow(graph: fx.Graph, model: nn.Module, names: dict[int, str], prefix: str) -> Dataflow:
    flow = Dataflow(part=prefix or None)
    values: dict[fx.Node, Value] = {}
    for node in graph.nodes:
        inputs = [values[other] for other in node.all_input_nodes]
        if node.op == "output":
            for value in inputs:
                value.is_result = True
        elif node.op in ("placeholder", "get_attr"):
            values[node] = Value(is_input=node.op == "placeholder")
        elif _hands_on(node, model):
            values[node] = inputs[0]
            inputs[0].handed_on = True
        else:
            values[node] = _call(node, inputs, model, names, flow)
    return flow


def _hands_on(node: fx.Node, model: nn.Module) -> bool:
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p == 0
    return isinstance(module, nn.Identity)


def _call(
    node: fx.Node, inputs: list[Value], model: nn.Module, names: dict[int, str], flow: Dataflow
) -> Value:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        call = Call(type(module).__name__, names[id(module)], "")
        in_place = bool(getattr(module, "inplace", False))
    else:
        raw = node.target if isinstance(node.target, str) else node.target.__name__
        call = Call(raw.strip("_"), None, _owner(node, names[id(model)]))
        call.parameters = _numbers(node)
        in_place = _is_in_place(node, raw)
    call.argument = inputs[0] if inputs else None
    call.overwrites = call.argument if in_place else None
    for value in inputs:
        value.readers.append(call)
    call.result = Value(producer=call)
    flow.calls.append(call)
    return call.result


def _owner(node: fx.Node, prefix: str) -> str:
    """Return the module in whose forward ``node`` is, by the trace's own record."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return _join(prefix, stack[-1][0]) if stack else prefix


def _numbers(node: fx.Node) -> tuple[Any, ...]:
    return (
        *(a for a in node.args if not isinstance(a, fx.Node)),
        *(v for k, v in node.kwargs.items() if k != "inplace" and not isinstance(v, fx.Node)),
    )


def _is_in_place(node: fx.Node, name: str) -> bool:
    if name.endswith("__"):
        return name.startswith("__i")
    operator_in_place = getattr(node.target, "__module__", "") == "_operator" and name in {
        "iadd", "isub", "imul", "itruediv", "iand", "ior",
    }  # fmt: skip
    return name.endswith("_") or operator_in_place or node.kwargs.get("inplace") is True


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
