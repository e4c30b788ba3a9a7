"""A proposal as the lines of Python that train so, to be pasted."""

from __future__ import annotations

from typing import Any

from bench.case import Case

__all__ = ["code_text"]


def code_text(case: Case) -> str:
    """Return lines that build the network of ``case`` with its techniques and take one step.

    They need torch, memsave and a GPU; ``image`` and ``target`` are the user's batch.
    """
    lines = ["import torch", "import memsave", *_loss_import(case), *_model_lines(case)]
    names = ", ".join(_entry(use.name, use.options) for use in _applied(case))
    example = ", example_inputs=image" if case.imported is not None else ""
    if names:
        lines += [f"applied = memsave.apply(model, [{names}]{example})", "model = applied.model"]
    if case.mode == "infer":
        return "\n".join([*lines, *_infer_lines(case)]) + "\n"
    lines.append(_optimizer_line(case))
    if names:
        lines.append("optimizer = applied.optimizer(optimizer)")
    lines.append(
        f'precision = memsave.MixedPrecision("{case.precision}", device_type=image.device.type)'
    )
    lines += ["", "# one step"]
    indent = ""
    if names:
        lines.append("with applied.step():")
        indent = "    "
    tiled = any(use.name == "tiled_levels" for use in case.techniques)
    loss = f'model.training_loss(image, target, "{case.loss}")' if tiled else _loss(case)
    lines += [
        f"{indent}with precision.forward():",
        f"{indent}    loss = {loss}",
        f"{indent}precision.backward(loss)",
        f"{indent}precision.step(optimizer)",
        f"{indent}optimizer.zero_grad(set_to_none=True)",
    ]
    return "\n".join(lines) + "\n"


def _model_lines(case: Case) -> list[str]:
    if case.imported is None:
        options = _built_options(case)
        return [
            "from memsave import networks",
            "",
            f'model = networks.build("{case.network}", {options!r}).to(image.device)',
        ]
    module, _, name = case.imported.reference.rpartition(":")
    arguments = ", ".join(f"{key}={value!r}" for key, value in case.imported.arguments.items())
    if module.endswith(".py"):
        load = [
            "import runpy",
            "",
            f'factory = runpy.run_path({module!r})["{name}"]',
        ]
    else:
        top, *rest = name.split(".")
        load = [f"from {module} import {top}", "", f"factory = {'.'.join([top, *rest])}"]
    return [*load, f"model = factory({arguments}).to(image.device)"]


def _built_options(case: Case) -> dict[str, Any]:
    """Return the network's options after those techniques that act when it is built."""
    from memsave.techniques import find_technique, parse_options

    options = dict(case.network_options)
    for use in case.techniques:
        technique = find_technique(use.name)
        options = dict(technique.build(options, parse_options(technique, use.options)))
    return options


def _applied(case: Case) -> list[Any]:
    """Return the techniques that act on the module, the step or the optimizer."""
    from memsave.techniques import Technique, find_technique

    plain_build = Technique.__dataclass_fields__["build"].default
    if case.imported is not None:
        return list(case.techniques)
    return [use for use in case.techniques if find_technique(use.name).build is plain_build]


def _entry(name: str, options: dict[str, Any]) -> str:
    return f'("{name}", {options!r})' if options else f'"{name}"'


def _optimizer_line(case: Case) -> str:
    from bench.workload import OPTIMIZERS

    if case.optimizer in OPTIMIZERS:
        kind, defaults = OPTIMIZERS[case.optimizer]
        options = {**defaults, **case.optimizer_options}
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        return f"optimizer = torch.optim.{kind.__name__}(model.parameters(){given})"
    module, _, name = case.optimizer.rpartition(":")
    return f"from {module} import {name}\noptimizer = {name}(model.parameters())"


def _loss_import(case: Case) -> list[str]:
    if case.mode == "infer" or case.loss == "sum":
        return []
    if ":" in case.loss:
        module, _, name = case.loss.rpartition(":")
        return [f"from {module} import {name}"]
    return ["from bench.losses import LOSSES"]


def _loss(case: Case) -> str:
    if ":" in case.loss:
        return f"{case.loss.rpartition(':')[2]}(model(image), target)"
    if case.loss == "sum":
        return "model(image).sum()  # your own loss stands here"
    return f'LOSSES["{case.loss}"](model(image), target)'


def _infer_lines(case: Case) -> list[str]:
    return [
        "model.eval()",
        f'precision = memsave.MixedPrecision("{case.precision}", device_type=image.device.type)',
        "with torch.no_grad(), precision.forward():",
        "    output = model(image)",
    ]
