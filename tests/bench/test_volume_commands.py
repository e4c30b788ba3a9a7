"""``plan`` and ``max-shape`` on a folder of volumes, and on networks of several channels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from bench.case import Case, TechniqueUse
from bench.cli.max_shape import max_shape
from bench.cli.plan import plan
from bench.named_case import named_case
from bench.plan.readings import at_shape
from bench.plan.search import budget_card
from bench.plan.simulator import Simulator
from bench.predict.cards import Card, all_cards
from bench.record import Record
from bench.shapes import Shape, format_shape, pad_to
from bench.suite.load import load_suite
from bench.units import MIB
from tests.bench.volume_files import write_volumes

CONTEXT = budget_card(2**40).context_bytes
SHAPES = {
    "ankle": (120, 64, 64),
    "brain": (96, 96, 90),
    "chest": (126, 120, 128),
    "dot": (16, 16, 16),
    "elbow": (64, 120, 64),
    "foot": (95, 90, 96),  # padded as brain is
}
PADDED = {name: pad_to(shape, (8, 8, 8)) for name, shape in SHAPES.items()}
# A prediction of the FCN needs 1892 MiB for the chest, 902 for the brain; in place 1652 and 854.
SIZE, IN_PLACE_SIZE = 1000 * MIB, 1700 * MIB
INFER = ("--network", "fcn", "--mode", "infer")
CONV3D = '{"in_channels": 4, "out_channels": 2, "kernel_size": 3, "padding": 1}'

apps = {"max-shape": typer.Typer(), "plan": typer.Typer()}
apps["max-shape"].command()(max_shape)
apps["plan"].command()(plan)


def invoke(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(apps[command], list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"), SHAPES)


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator(budget_card(CONTEXT + SIZE)) as running:
        yield running


class Borrowed(Simulator):
    """Simulates in the children of another one: a command need not start its own."""

    lender: Simulator

    def __init__(self, card: Card) -> None:
        self.card, self.traced = card, 0

    def __exit__(self, *_exception: object) -> None:
        pass

    def budgets(self, cases: Sequence[Case]) -> list[tuple[int, ...]]:
        return self.lender.budgets(cases)

    def records(
        self,
        cases: Sequence[Case],
        card: Card | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> list[Record]:
        self.traced += len(cases)
        return self.lender.records(cases, card or self.card, on_record)


@pytest.fixture(autouse=True)
def _one_simulator(monkeypatch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    monkeypatch.setattr(Borrowed, "lender", simulator, raising=False)
    monkeypatch.setattr("bench.plan.simulator.Simulator", Borrowed)


def simulate(
    simulator: Simulator, shapes: list[Shape], *techniques: str, size: int = SIZE
) -> dict[Shape, Record]:
    """Return each shape's record, simulated by itself."""
    uses = [TechniqueUse(name=name) for name in techniques]
    case = named_case("fcn", shape="64x64x64", mode="infer", techniques=uses)
    card = budget_card(CONTEXT + size)
    records = simulator.records([at_shape(case, shape) for shape in shapes], card)
    return dict(zip(shapes, records, strict=True))


def budget(size: int = SIZE) -> tuple[str, str]:
    return ("--budget", str(CONTEXT + size))


# -- max-shape --------------------------------------------------------------------------------


def test_the_folders_figures_are_those_of_each_shape_simulated_by_itself(
    folder: Path, simulator: Simulator
) -> None:
    result = invoke("max-shape", *INFER, *budget(), "--volumes", str(folder), "--json")

    found = json.loads(result.stdout)
    volumes = found["volumes"]
    alone = simulate(simulator, sorted(set(PADDED.values())))
    fits = {name for name, shape in PADDED.items() if alone[shape].status == "ok"}
    assert 0 < len(fits) < len(SHAPES)
    assert result.exit_code == 0
    assert (volumes["total"], volumes["fitting"], volumes["shapes"]) == (6, len(fits), 5)
    assert volumes["share"] == len(fits) / 6
    assert volumes["not_fitting"] == [f"{name}.nii" for name in SHAPES if name not in fits]
    for case in volumes["cases"]:
        record = alone[tuple(case["shape"])]
        assert case["fits"] == (record.status == "ok")
        assert case["needs_bytes"] in (None, record.needs_bytes)
        assert case["simulated"] == (case["needs_bytes"] is not None)
    assert volumes["worst"]["volume"] == "chest.nii"
    assert volumes["worst"]["needs_bytes"] == max(r.needs_bytes or 0 for r in alone.values())
    largest = max((PADDED[name] for name in fits), key=math.prod)
    assert found["shape"] == list(largest) == volumes["largest_fitting"]["shape"]
    assert found["peak_reserved_bytes"] == alone[largest].peak_reserved_bytes


def test_the_patch_fits_and_the_next_one_does_not(folder: Path, simulator: Simulator) -> None:
    size = 200 * MIB
    result = invoke("max-shape", *INFER, *budget(size), "--volumes", str(folder), "--json")

    patch = json.loads(result.stdout)["volumes"]["patch"]
    shape, following = tuple(patch["shape"]), tuple(patch["next_shape"])
    card = budget_card(CONTEXT + size)
    case = named_case("fcn", shape=format_shape(shape), mode="infer")
    fitting, failing = simulator.records([case, at_shape(case, following)], card)
    assert (fitting.status, failing.status) == ("ok", "oom")
    assert patch["peak_reserved_bytes"] == fitting.peak_reserved_bytes
    assert patch["process_bytes"] == fitting.process_bytes
    assert all(side % 8 == 0 for side in shape)
    # The upper medians of the six are 96, 96 and 90.
    assert all(side <= median for side, median in zip(shape, (96, 96, 90), strict=True))


def test_people_read_the_share_the_worst_and_the_patch(folder: Path) -> None:
    result = invoke("max-shape", *INFER, *budget(), "--volumes", str(folder))

    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert "5 of 6 volumes fit budget" in lines[0]
    assert "(83 %, predicted)" in lines[0]
    assert lines[1].startswith("  worst: chest.nii (126x120x128, run as 128x120x128), needs ")
    assert lines[2].startswith("  largest that fits: brain.nii and 1 alike (96x96x90, run as ")
    assert lines[3].startswith("  for the one that does not fit: patches of ")
    assert lines[4] == "  too large: chest.nii"


def test_no_volume_that_fits_is_exit_code_1_and_a_patch_may_still_do(tmp_path: Path) -> None:
    write_volumes(tmp_path, {"a": (128, 128, 128), "b": (128, 128, 16)})

    result = invoke("max-shape", *INFER, *budget(300 * MIB), "--volumes", str(tmp_path))

    assert result.exit_code == 1
    assert "0 of 2 volumes fit" in result.stdout
    assert "for the 2 that do not fit: patches of " in result.stdout
    assert "; 1 of them padded" in result.stdout
    assert "within every one of them: patches of " in result.stdout


def test_spacing_changes_the_shapes_before_they_are_simulated(folder: Path) -> None:
    arguments = (*INFER, *budget(), "--volumes", str(folder), "--spacing", "2,2,2", "--json")

    volumes = json.loads(invoke("max-shape", *arguments).stdout)["volumes"]

    assert volumes["spacing"] == [2.0, 2.0, 2.0]
    assert volumes["worst"]["requested_shape"] == [63, 60, 128]  # of 1 x 1 x 2 mm
    assert volumes["fitting"] == 6
    assert volumes["patch"] is None


def test_all_cards_say_the_share_of_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: all_cards()[name] for name in ("t4-16gb", "rtx3060-12gb")}
    monkeypatch.setattr("bench.predict.cards.all_cards", lambda: few)
    arguments = ("--all-cards", *INFER, "--volumes", str(folder), "--techniques", "inplace_abn")

    result = invoke("max-shape", *arguments)
    data = json.loads(invoke("max-shape", *arguments, "--json").stdout)

    assert [(one["card"], one["volumes"]["fitting"]) for one in data] == [
        ("rtx3060-12gb", 6),
        ("t4-16gb", 6),
    ]
    assert result.stdout.count("6 of 6") == 2


# -- networks of one's own --------------------------------------------------------------------


def test_a_network_of_several_channels_keeps_the_proportions_of_its_input(
    simulator: Simulator,
) -> None:
    arguments = ("--network", "torch.nn:Conv3d", "--arguments", CONV3D, "--mode", "infer")
    shape = ("--input", "1x4x128x128x64", "--divisor", "32")

    result = invoke("max-shape", *arguments, *shape, *budget(), "--json")

    found = json.loads(result.stdout)
    x, y, slices = found["shape"]
    assert x == y
    assert x % 32 == slices % 32 == 0
    assert slices == -(-x // 2 // 32) * 32  # half of the others, rounded up
    text = f"1x4x{x}x{y}x{slices}"
    case = named_case("torch.nn:Conv3d", inputs=[text], arguments=json.loads(CONV3D), mode="infer")
    (record,) = simulator.records([case])
    assert found["peak_reserved_bytes"] == record.peak_reserved_bytes
    following = simulator.records([at_shape(case, tuple(found["next_shape"]))])
    assert following[0].status == "oom"


def test_a_network_in_2d_grows_with_its_batch_and_channels() -> None:
    conv2d = ("--network", "torch.nn:Conv2d", "--arguments", CONV3D, "--mode", "infer")

    one, four = (
        json.loads(
            invoke("max-shape", *conv2d, "--input", f"{n}x4x64x64", *budget(), "--json").stdout
        )
        for n in (1, 4)
    )

    assert one["shape"][0] == one["shape"][1]
    # Four times the batch is a quarter of the pixels, to within the step of 16.
    assert four["batch_size"] == 4
    assert abs(one["shape"][0] - 2 * four["shape"][0]) <= 32


def test_a_folder_is_given_to_a_network_with_the_channels_of_its_input(folder: Path) -> None:
    own = ("--network", "torch.nn:Conv3d", "--arguments", CONV3D, "--mode", "infer")

    for text in ("1x4", "1x4x8x8x8"):
        result = invoke(
            "max-shape", *own, "--input", text, "--volumes", str(folder), *budget(), "--json"
        )
        volumes = json.loads(result.stdout)["volumes"]
        assert volumes["worst"]["shape"] == [128, 128, 128]  # multiples of 16
    one_channel = invoke("max-shape", *own, "--volumes", str(folder), *budget())
    assert one_channel.exit_code == 2
    assert "to have 4 channels, but got 1" in one_channel.stderr


# -- plan -------------------------------------------------------------------------------------


def planned(folder: Path, size: int, *more: str) -> tuple[Result, list[dict[str, Any]]]:
    arguments = (*INFER, "--precision", "fp32", *budget(size), "--volumes", str(folder), "--json")
    result = invoke("plan", *arguments, *more)
    return result, json.loads(result.stdout)


def test_a_plan_is_for_the_worst_volume_and_each_proposal_says_its_share(
    folder: Path, simulator: Simulator
) -> None:
    result, proposals = planned(folder, IN_PLACE_SIZE)

    assert [p["techniques"] for p in proposals] == [["inplace_abn"], []]
    for proposal in proposals:
        shapes = sorted(set(PADDED.values()))
        alone = simulate(simulator, shapes, *proposal["techniques"], size=IN_PLACE_SIZE)
        fitting = sum(alone[shape].status == "ok" for shape in PADDED.values())
        assert proposal["volumes_fitting"] == fitting
        assert proposal["volumes_total"] == 6
        assert proposal["worst_volume"] == "chest.nii"
        assert proposal["shape"] == [128, 120, 128]
        assert proposal["requested_shape"] == [126, 120, 128]
        assert proposal["needs_bytes"] == alone[PADDED["chest"]].needs_bytes
        assert (proposal["patch_shape"] is None) == (fitting == 6)
    assert [p["volumes_fitting"] for p in proposals] == [6, 5]
    assert result.exit_code == 0


def test_the_suite_of_patches_gives_the_same_bytes_again(
    folder: Path, simulator: Simulator, tmp_path: Path
) -> None:
    path = tmp_path / "patches.yaml"
    size = 500 * MIB

    result, proposals = planned(folder, size, "--write-suite", str(path))

    assert result.exit_code == 1
    assert all(0 < p["volumes_fitting"] < 6 for p in proposals)
    shares = [p["volumes_fitting"] for p in proposals]
    assert shares == sorted(shares, reverse=True)
    cases = load_suite(str(path)).own_cases
    records = simulator.records(cases, budget_card(CONTEXT + size))
    assert [list(c.shape) for c in cases] == [p["patch_shape"] for p in proposals]
    assert len({c.shape for c in cases}) == 2  # each row has a shape of its own
    assert [r.peak_reserved_bytes for r in records] == [
        p["patch_peak_reserved_bytes"] for p in proposals
    ]


def test_where_all_fit_one_simulation_around_all_of_them_is_enough(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "best.yaml"
    arguments = (*INFER, "--precision", "fp32", *budget(4000 * MIB), "--volumes", str(folder))

    result = invoke("plan", *arguments, "--write-suite", str(path), "--code")

    assert result.exit_code == 0
    assert "the worst of 6 volumes" in result.stdout
    assert result.stdout.count("6 of 6") == 2
    assert "import memsave" in result.stdout
    suite = load_suite(str(path))
    assert {c.requested_shape for c in suite.own_cases} == {(126, 120, 128)}
    assert len(suite.cases(volumes=folder)) == 2 * 6  # and measures the folder


def test_a_plan_that_fits_not_all_says_so_and_shows_the_patches(folder: Path) -> None:
    arguments = (*INFER, "--precision", "fp32", *budget(150 * MIB), "--volumes", str(folder))

    result = invoke("plan", *arguments, "--code")

    assert result.exit_code == 1
    assert "no combination is known to make all of the 6 volumes fit" in result.stdout
    assert "patch for the rest" in result.stdout
    assert "the smallest card that has so much: " in result.stdout
    assert "import memsave" in result.stdout


def test_proposals_beyond_the_limit_are_not_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.plan.folder_plan.MOST_SIMULATIONS", 1)

    _, proposals = planned(folder, SIZE)

    looked = [p for p in proposals if p["volumes_fitting"] is not None]
    assert len(looked) == 1
    assert all(p["patch_shape"] is None for p in proposals if p not in looked)


# -- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["max-shape", "plan"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--network", "fcn", "--volumes", "no-such-folder"), "no folder no-such-folder"),
        (("--network", "fcn", "--volumes", ".", "--input", "1x1x8x8x8"), "leave out --input"),
        (("--network", "fcn", "--volumes", ".", "--divisor", "4"), "fcn's sides are multiples"),
        (("--network", "fcn", "--spacing", "1,1,1"), "together with --volumes"),
        (("--network", "fcn", "--volumes", ".", "--spacing", "1,1"), "three positive numbers"),
        (("--network", "pocketnet_2d", "--volumes", "."), "takes slices of 2 sides"),
        (("--network", "no_such", "--volumes", "."), "no_such"),
        (
            ("--network", "torch.nn:Conv3d", "--volumes", ".", "--input", "1x1x8x8"),
            "takes slices of 2 sides",
        ),
        (
            ("--network", "torch.nn:Conv3d", "--volumes", ".", "--input", "1x1", "--input", "1x1"),
            "given 2 times",
        ),
        (
            ("--network", "torch.nn:Conv3d", "--volumes", ".", "--input", "2x1", "--batch", "3"),
            "two batch sizes",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    command: str, arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    write_volumes(tmp_path, {"a": (8, 8, 8)})
    given = [str(tmp_path) if part == "." else part for part in arguments]

    result = invoke(command, *given, "--card", "rtx4090-24gb")

    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("max-shape", ("--network", "fcn", "--volumes", ".", "--inplane", "64x64"), "--inplane"),
        ("max-shape", ("--network", "fcn", "--volumes", ".", "--isotropic"), "--isotropic"),
        ("max-shape", ("--network", "torch.nn:Conv3d", "--input", "1x4"), "no image of two or"),
        ("plan", ("--network", "fcn", "--volumes", ".", "--shape", "64x64x64"), "--shape"),
        ("plan", ("--network", "fcn", "--volumes", ".", "--target", "1x8x8x8"), "--target"),
        ("plan", ("--network", "fcn", "--shape", "8x8x8", "--divisor", "4"), "with --volumes"),
    ],
)
def test_a_command_refuses_what_does_not_go_with_a_folder(
    command: str, arguments: tuple[str, ...], words: str
) -> None:
    result = invoke(command, *arguments, "--card", "rtx4090-24gb")

    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
