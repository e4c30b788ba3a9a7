"""What autograd does beside the operators' results, as torch's CUDA build was seen to do it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.predict import matrix_products
from bench.predict.tracer import Tracer

SIDE = 16
NUMBER_BYTES = 4


def backward_tensors(change_in_place: bool, whole: bool) -> int:
    """How many tensors as large as the input backward makes of an activation after a view."""
    with FakeTensorMode(), Tracer("cpu") as tracer:
        x = torch.empty(1, SIDE, SIDE, requires_grad=True)
        product = x * 1
        view = product.view(SIDE, SIDE) if whole else product[:, : SIDE // 2]
        result = F.leaky_relu_(view) if change_in_place else F.leaky_relu(view)
        gradient: Tensor = torch.empty_like(result)
        before = len(tracer.trace.events)
        result.backward(gradient)  # type: ignore[no-untyped-call]
        made = [e for e in tracer.trace.events[before:] if e[0] == "alloc"]
    return sum(event[2] == SIDE * SIDE * NUMBER_BYTES for event in made)


def test_the_gradient_of_a_view_that_was_written_has_room_of_its_own() -> None:
    # The window's; the base's, its slice and the activation's within CopySlices; the product's.
    assert backward_tensors(change_in_place=True, whole=True) == 5


def test_an_activation_that_writes_nothing_takes_two() -> None:
    assert backward_tensors(change_in_place=False, whole=True) == 2


def test_a_view_of_a_part_has_that_room_already() -> None:
    # The slice's backward fills zeros as large as the base: no second time; then the base's own
    # within CopySlices and the product's, while slice and activation there are half as large.
    assert backward_tensors(change_in_place=True, whole=False) == 3


def linear_steps(steps: int) -> Tracer:
    with FakeTensorMode(), Tracer("cpu") as tracer:
        layer = torch.nn.Linear(8, 8)
        for _ in range(steps):
            layer(torch.empty(4, 8, requires_grad=True)).sum().backward()
    return tracer


def test_forward_and_backward_have_a_cublas_handle_each() -> None:
    events = linear_steps(2).trace.events
    assert sum(event[0] == "cublas" for event in events) == 2


@pytest.mark.parametrize(("shared", "workspaces"), [(True, 0), (False, 1)])
def test_where_cublaslt_shares_nothing_linear_layers_keep_a_mebibyte(
    monkeypatch: pytest.MonkeyPatch, shared: bool, workspaces: int
) -> None:
    """As in torch 2.11; in backward, products have no bias and stay with cuBLAS."""
    monkeypatch.setattr(matrix_products, "_SHARED", shared)
    trace = linear_steps(2).trace
    kept = [e[1] for e in trace.events if e[0] == "alloc" and e[2] == 1 << 20]
    assert [trace.categories[identity] for identity in kept] == ["workspace"] * workspaces
    freed = {event[1] for event in trace.events if event[0] == "free"}
    assert not freed & set(kept)
