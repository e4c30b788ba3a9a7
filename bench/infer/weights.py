"""The pipeline's two networks with random weights, or with those of a file.

A weights file is what ``torch.save({"light_unet": ..., "dense_vnet": ...})`` writes of two state
dicts. It is read with ``weights_only=True``: tensors and plain containers, no code.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import MembenchError
from bench.infer.stages import SEED, STAGES
from memsave import networks

__all__ = ["build_networks", "load_weights"]


def build_networks(weights: Path | Sequence[Path] | None = None) -> dict[str, nn.Module]:
    """Return the networks of both stages by name, on the CPU and ready to predict.

    ``weights``: one file with both networks', or several that have them between them. Without it
    they are random, the same in every run and on every device.
    Errors: MembenchError as ``load_weights``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        built = {stage.network: networks.build(stage.network, {}).eval() for stage in STAGES}
    if isinstance(weights, Path):
        load_weights(weights, built)
    elif weights:
        _load_from_several(weights, built)
    return built


def _load_from_several(paths: Sequence[Path], into: Mapping[str, nn.Module]) -> None:
    lacking = set(into)
    for path in paths:
        states = _read(path)
        held = {name: into[name] for name in into if isinstance(states, dict) and name in states}
        load_weights(path, held or into)  # a file of neither is refused, as one alone would be
        lacking -= set(held)
    if lacking:
        listed = ", ".join(map(str, paths))
        raise MembenchError(f"{listed} hold no state dict {min(lacking)!r}; give its file too")


def load_weights(path: Path, into: Mapping[str, nn.Module]) -> None:
    """Load every network of ``into`` from its state dict in the file ``path``.

    Errors: MembenchError for a file that is missing, is no weights file, lacks a network, or does
    not fit one; the message names the first key that does not. Nothing is loaded then.
    """
    states = _read(path)
    if not isinstance(states, dict):
        raise MembenchError(f"{path} holds a {type(states).__name__}, not {_form(into)}")
    missing = [name for name in into if not isinstance(states.get(name), Mapping)]
    if missing:
        raise MembenchError(f"{path} holds no state dict {missing[0]!r}; it must be {_form(into)}")
    for name, network in into.items():
        mismatch = _first_mismatch(network.state_dict(), states[name])
        if mismatch:
            raise MembenchError(f"{path} does not fit {name}: {mismatch}")
    for name, network in into.items():
        network.load_state_dict(states[name])


def _read(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a pickle that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise MembenchError(f"cannot read weights {path}: {error.strerror or error}") from None
    # What torch's readers raise for bytes that are no weights file, by where they stumble.
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError):
        raise MembenchError(
            f"{path} is not a weights file that can be read safely: torch.save a dict of tensors"
        ) from None


def _first_mismatch(ours: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> str:
    """Say which key is the first that differs: lacking, of another shape, or not known."""
    for key, tensor in ours.items():
        given = theirs.get(key)
        if not isinstance(given, Tensor):
            return f"it has no tensor {key!r}"
        if given.shape != tensor.shape:
            return f"{key!r} is {_sides(given)}, the network's is {_sides(tensor)}"
    unknown = [key for key in theirs if key not in ours]
    return f"the network has no {unknown[0]!r}" if unknown else ""


def _sides(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _form(into: Mapping[str, nn.Module]) -> str:
    return "{" + ", ".join(f'"{name}": its state dict' for name in into) + "}"
