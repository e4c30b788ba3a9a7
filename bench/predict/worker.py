"""The process in which cases are traced: ``python -m bench.predict.worker``.

The library that lets fake tensors live on ``cuda:0`` must be loaded before torch, and changes
what torch says of the machine: so it is never loaded in a user's own process. One worker traces
many cases, since importing torch is most of a case's time.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from bench.predict.tracing_process import become
from bench.serve import serve

__all__ = ["main"]


def main() -> None:
    """Load the tracer that ``MEMBENCH_WORKER_TRACER`` names, then serve cases."""
    tracer = os.environ["MEMBENCH_WORKER_TRACER"]
    become(tracer)
    import torch

    if tracer == "cuda-shim":
        from bench.predict.cuda_answers import answer_users

        answer_users()
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    hello = {
        "tracer": tracer,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    serve(hello, lambda request: _predict(request, tracer))


def _predict(request: dict[str, Any], tracer: str) -> dict[str, Any]:
    from bench.case import Case
    from bench.predict.alloc_conf import parse_alloc_conf
    from bench.predict.budget_choices import case_budgets
    from bench.predict.cards import Card
    from bench.predict.case_calls import case_calls
    from bench.predict.predictor import predict

    # Where the asking process finds what it named; ours, such as this directory, come first.
    sys.path.extend(p for p in request.get("search_path", ()) if p not in sys.path)
    case = Case.from_definition(request["case"])
    device_type = "cpu" if tracer == "cpu" else "cuda"
    if request.get("calls"):
        return case_calls(case, device_type)
    if request.get("budgets"):
        return case_budgets(case, device_type)
    return predict(
        case,
        Card.from_dict(request["card"]),
        device_type=device_type,
        settings=parse_alloc_conf(request["allocator_settings"]),
        with_trace=bool(request.get("with_trace")),
    )


if __name__ == "__main__":
    main()
