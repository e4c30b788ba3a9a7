"""Every developer's command. ``nox -l`` lists them, ``nox -s NAME`` runs one.

Versions come from constraints.txt, dependencies from the groups in pyproject.toml.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"  # nox.project.dependency_groups
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True  # torch is large

PYPROJECT = nox.project.load_toml("pyproject.toml")
PINNED = ("-c", "constraints.txt")
PATHS = ("bench", "memsave", "tests", "noxfile.py")


def install(session: nox.Session, *groups: str, package: bool = True) -> None:
    """Install the groups' dependencies, and membench itself from this tree."""
    needed = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    session.install(*PINNED, *needed, *(("-e", ".") if package else ()))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; those that need a GPU skip without one. Arguments go to pytest."""
    install(session, "test")
    # Most of a test's time is a child that imports torch: one of them for each core.
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that take longer than a developer waits."""
    install(session, "test")
    session.run("python", "-m", "pytest", "-m", "slow and not gpu", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests under coverage and fail below 90 % of bench and memsave."""
    install(session, "test")
    # Not pytest-cov: our pytest plugin, and so the package, is imported before it could begin.
    session.run("python", "-m", "coverage", "erase")
    session.run("python", "-m", "coverage", "run", "-m", "pytest", *session.posargs)
    session.run("python", "-m", "coverage", "combine")
    session.run("python", "-m", "coverage", "report", "--fail-under=90")


@nox.session
def bench(session: nox.Session) -> None:
    """Time techniques against what they replace, side by side; a table of ratios comes last."""
    install(session, "test")
    options = ("--benchmark-enable", "--benchmark-disable-gc", "--benchmark-warmup=off")
    session.run("python", "-m", "pytest", "tests/benchmarks", *options, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    install(session, "lint", package=False)
    session.run("ruff", "check", *PATHS)
    session.run("ruff", "format", "--check", *PATHS)


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy --strict, tests included."""
    install(session, "dev")  # with nox itself, for this file
    session.run("mypy", "--strict")


@nox.session
def table1(session: nox.Session) -> None:
    """Print Table 1 of the FCN paper, predicted for its V100; arguments replace that."""
    install(session)
    options = session.posargs or ("--device", "predict")
    session.run("python", "-m", "bench", "run", "table1", *options)


@nox.session
def baseline(session: nox.Session) -> None:
    """Predict every suite again and write results/baselines/, which the tests hold us to.

    Arguments: the suites to do, by default all. Look at what git says changed before committing.
    """
    install(session)
    folder = Path(session.create_tmp()) / "results"
    suites = session.posargs or sorted(path.stem for path in Path("suites").glob("*.yaml"))
    for suite in suites:
        found = folder / suite
        shutil.rmtree(found, ignore_errors=True)  # a case that is gone would be found there
        membench = ("python", "-m", "bench")
        session.run(*membench, "run", suite, "--device", "predict", "--results", str(found))
        written = f"results/baselines/{suite}.json"
        session.run(*membench, "baseline", str(found), "-o", written, "--allow-fewer")


@nox.session
def plans(session: nox.Session) -> None:
    """Plan the FCN's largest volume for five cards: results/plans/ and reports/plans.md.

    Arguments: the cards to do anew. Put the rows that it prints last into the README's table.
    """
    install(session)
    session.run("python", "-m", "bench.plan_session", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Do all that needs a GPU: its tests, every suite measured and predicted, into results/."""
    install(session, "test")
    session.run("python", "-m", "bench.gpu_session", *session.posargs)


@nox.session
def stand_in(session: nox.Session) -> None:
    """Run torch's CUDA build on a stand-in GPU, see tests/stand_in: no GPU is needed, g++ is.

    Runs the tests marked ``gpu``, the allocator's and the stand-in's own, then writes
    reports/host_code.md. Arguments: the suites to compare, by default three.
    """
    # No constraints.txt here: it may pin another torch, and this one has to be PyPI's, for CUDA 13.
    session.install("torch==2.11.0", "nvidia-cuda-crt==13.0.*", "nvidia-cuda-cccl==13.0.*")
    session.install(*nox.project.dependency_groups(PYPROJECT, "test"), "-e", ".")
    here = ("python", "-m", "tests.stand_in", "--")
    tests = ("-m", "pytest", "tests/gpu", "-m", "gpu", "-W", "default")
    context = {"STANDIN_CONTEXT_BYTES": str(512 << 20)}  # the size of a real one
    session.run(*here, *tests, env=context)
    session.run(*here, "-m", "tests.stand_in.allocator_programs", "--seed", "0", "--count", "20")
    session.run(
        "python", "-m", "pytest", "tests/stand_in", "-m", "slow or not slow", "-W", "default"
    )
    suites = session.posargs or ("table1", "heldout", "pocketnet_3d")
    session.run("python", "-m", "tests.stand_in.host_code", *suites)
