"""Which matrix products take a workspace, in what order, and what a linear layer writes in place.

Held against torch's CUDA build on the stand-in GPU, 2.11 and 2.13. Sizes are worked out from the
shapes; everything is float32 where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bench.predict import matrix_products
from bench.predict.matrix_products import LT_WORKSPACE_BYTES
from bench.predict.tracer import Tracer

ROWS, IN, OUT = 64, 32, 16
RESULT = ROWS * OUT * 4


def new(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=grad)


def taken(program: Callable[..., object], *make: Callable[[], Tensor]) -> list[int | str]:
    """What the program takes of tensors, and the name of what it asks for of cuBLAS, in order."""
    with FakeTensorMode(), Tracer("cpu") as tracer:
        tensors = [one() for one in make]
        begun = len(tracer.trace.events)
        program(*tensors)
        tracer.stop()
    events = tracer.trace.events[begun:]
    return [e[2] if e[0] == "alloc" else e[0] for e in events if e[0] in ("alloc", "cublas")]


def operands(dtype: torch.dtype = torch.float32) -> list[Callable[[], Tensor]]:
    """A bias, and two factors."""
    return [
        lambda: new(OUT, dtype=dtype),
        lambda: new(ROWS, IN, dtype=dtype),
        lambda: new(IN, OUT, dtype=dtype),
    ]


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 has it, whatever is installed."""
    monkeypatch.setattr(matrix_products, "_SHARED", False)


@pytest.mark.parametrize(
    ("program", "lt"),
    [
        (lambda b, x, w: torch.addmm(b, x, w), True),
        (lambda b, x, w: torch.addmm(b, x, w, alpha=0.5), True),
        (lambda b, x, w: torch.addmm(b.view(1, OUT), x, w), True),
        (lambda b, x, w: torch.addmm(b, x, w, beta=0.5), False),
        (lambda b, x, w: torch.addmm(b, x, w, beta=0), False),
        (lambda b, x, w: torch.addmm(b[:1], x, w), False),
        (lambda b, x, w: torch.addmm(b[:1].expand(OUT), x, w), False),
        (lambda _b, x, w: x @ w, False),
    ],
    ids=["row", "scaled", "matrix of a row", "half", "none", "number", "spread number", "plain"],
)
def test_a_row_that_is_added_whole_goes_to_cublaslt(
    program: Callable[..., object], lt: bool
) -> None:
    assert taken(program, *operands()) == [RESULT, "cublas", *[LT_WORKSPACE_BYTES] * lt]


def test_a_product_whose_weight_has_one_row_or_column_stays_with_cublas() -> None:
    narrow = [lambda: new(1), lambda: new(ROWS, IN), lambda: new(IN, 1)]
    assert taken(torch.addmm, *narrow) == [ROWS * 4, "cublas"]
    thin = [lambda: new(OUT), lambda: new(ROWS, 1), lambda: new(1, OUT)]
    assert taken(torch.addmm, *thin) == [RESULT, "cublas"]


def test_complex_numbers_stay_with_cublas() -> None:
    assert taken(torch.addmm, *operands(torch.complex64)) == [2 * RESULT, "cublas"]
    assert taken(torch.addmm, *operands(torch.float64)) == [
        *(2 * RESULT, "cublas", LT_WORKSPACE_BYTES)
    ]


@pytest.mark.parametrize(
    ("program", "size"),
    [
        (lambda: torch.addmm(new(8), new(8, 0), new(0, 8)), [32, 256]),
        (lambda: torch.bmm(new(2, 8, 0), new(2, 0, 8)), [2 * 64 * 4]),
        (lambda: torch.mv(new(8, 0), new(0)), [32]),
    ],
    ids=["addmm", "bmm", "mv"],
)
def test_a_product_of_nothing_calls_no_library(
    program: Callable[[], object], size: list[int]
) -> None:
    assert taken(program) == size


@pytest.mark.parametrize(
    "program",
    [
        lambda: torch.dot(new(8), new(8)),
        lambda: new(8, 8).addmm_(new(8, 8), new(8, 8)),
        lambda: new(2, 8, 8).baddbmm_(new(2, 8, 8), new(2, 8, 8)),
        lambda: new(8).addmv_(new(8, 8), new(8)),
        lambda: torch._addmm_activation(new(8), new(8, 8), new(8, 8)),
    ],
    ids=["dot", "addmm_", "baddbmm_", "addmv_", "activation"],
)
def test_every_product_asks_for_the_workspace(program: Callable[[], object]) -> None:
    assert taken(program).count("cublas") == 1


@pytest.mark.parametrize(("shared", "asked"), [(True, False), (False, True)])
def test_rows_of_one_number_are_multiplied_without_cublas_since_torch_2_13(
    monkeypatch: pytest.MonkeyPatch, shared: bool, asked: bool
) -> None:
    monkeypatch.setattr(matrix_products, "_SHARED", shared)
    assert ("cublas" in taken(lambda: torch.bmm(new(8, 4, 1), new(8, 1, 4)))) is asked
    assert "cublas" in taken(lambda: torch.bmm(new(8, 4, 2), new(8, 2, 4)))
    complex64 = torch.complex64
    assert "cublas" in taken(
        lambda: torch.bmm(new(8, 4, 1, dtype=complex64), new(8, 1, 4, dtype=complex64))
    )


# -- what a linear layer writes in place -----------------------------------------------------------

TURNED = 4 * 9 * OUT * 4  # the result for 4 x 9 rows
COPY = 4 * 9 * IN * 4  # of the input, which lies turned


def layer() -> list[Callable[[], Tensor]]:
    return [
        lambda: new(4, IN, 9, grad=True),
        lambda: new(OUT, IN, grad=True),
        lambda: new(OUT, grad=True),
    ]


def test_the_bias_of_an_input_that_lies_turned_is_added_over_the_product() -> None:
    assert taken(lambda x, w, b: F.linear(x.transpose(1, 2), w, b), *layer()) == [
        *(COPY, TURNED, "cublas"),
    ]


def test_a_module_on_an_input_of_four_sides_does_the_same() -> None:
    linear = torch.nn.Linear(IN, OUT, device="meta")
    weights = [lambda: new(OUT, IN), lambda: new(OUT)]

    def program(x: Tensor, *weights: Tensor) -> None:
        torch.func.functional_call(linear, {"weight": weights[0], "bias": weights[1]}, x.mT)

    # 2 x 2 x 9 rows are as many as 4 x 9. Without gradients cuBLAS reads them as they lie.
    assert taken(program, lambda: new(2, 2, IN, 9), *weights) == [TURNED, "cublas"]


def test_a_persons_own_sum_is_a_tensor_beside_the_product() -> None:
    sizes = taken(lambda x, w, b: x.transpose(1, 2) @ w.t() + b, *layer())
    assert sizes == [COPY, TURNED, "cublas", TURNED]


def test_a_recomputation_adds_it_over_the_product_too() -> None:
    def program(x: Tensor, w: Tensor, b: Tensor) -> None:
        def layers(*args: Tensor) -> Tensor:
            return F.linear(*args).exp()

        out: Tensor = checkpoint(layers, x.transpose(1, 2), w, b, use_reentrant=False)
        torch.autograd.grad(out, w, torch.empty_like(out))

    # The product and exp, the gradient that is given; both again, and exp's gradient.
    assert taken(program, *layer()) == [
        *(COPY, TURNED, "cublas", TURNED, TURNED),
        *(COPY, TURNED, "cublas", TURNED, TURNED, IN * OUT * 4),
    ]


def test_gradients_reach_what_a_turned_linear_layer_has_read() -> None:
    with FakeTensorMode(), Tracer("cpu"):
        tensors = [one() for one in layer()]
        out = F.linear(tensors[0].transpose(1, 2), *tensors[1:])
        grads = torch.autograd.grad(out.exp().sum(), tensors)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
