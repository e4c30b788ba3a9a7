"""Which volumes of a folder fit: as simulating each would say, with few simulated; and patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.case import Case
from bench.errors import MembenchError
from bench.imported import Imported
from bench.named_case import named_case
from bench.plan.folder import Folder, FolderShape, read_folder
from bench.plan.patches import in_proportion, patches
from bench.plan.readings import Readings, at_shape
from bench.plan.search import budget_card
from bench.plan.shares import Share, find_share, maxima, within
from bench.plan.simulator import Simulator
from bench.plan.volumes import FolderSearch, find_patch, rest_sides
from bench.predict.cards import Card
from bench.record import Record
from bench.shapes import Shape, pad_to
from bench.units import MIB
from tests.bench.records import make_record
from tests.bench.volume_files import write_volumes

CONTEXT = budget_card(2**40).context_bytes
DIVISOR = (8, 8, 8)
CASE = named_case("fcn", shape="64x64x64")


class Formula:
    """Stands for a simulator: what a case needs is a formula of its shape, what it holds more."""

    def __init__(self, needs: Callable[[Shape], int], held_more: int = 0) -> None:
        self.needs, self.held_more = needs, held_more
        self.asked: list[Shape] = []

    def records(self, cases: Sequence[Case], card: Card) -> list[Record]:
        self.asked += [case.shape for case in cases]
        return [self._record(case, card) for case in cases]

    def _record(self, case: Case, card: Card) -> Record:
        needs = self.needs(case.shape)
        if needs > card.capacity_bytes:
            return make_record(status="oom", reason="small", needs_bytes=needs, process_bytes=None)
        reserved = min(needs + self.held_more, card.capacity_bytes)
        return make_record(
            needs_bytes=needs,
            peak_reserved_bytes=reserved,
            process_bytes=reserved + card.context_bytes,
        )


def per_voxel(shape: Shape) -> int:
    return 100 * math.prod(shape)


def card_of(capacity_bytes: int) -> Card:
    return budget_card(CONTEXT + capacity_bytes)


def folder_of(sides: Sequence[Shape]) -> Folder:
    """Return the folder that volumes of these sides would be, one file each."""
    padded: dict[Shape, list[int]] = {}
    for place, shape in enumerate(sides):
        padded.setdefault(pad_to(shape, DIVISOR), []).append(place)
    shapes = [
        FolderShape(shape=s, requested=sides[p[0]], volumes=tuple(f"v{i}.nii" for i in p))
        for s, p in padded.items()
    ]
    shapes.sort(key=lambda one: -math.prod(one.shape))
    return Folder(
        path=Path("volumes"),
        spacing=None,
        divisor=DIVISOR,
        shapes=tuple(shapes),
        sides=tuple(sides),
    )


def share_of(formula: Formula, folder: Folder, card: Card) -> Share:
    return find_share(Readings(CASE, cast(Simulator, formula)), folder, card)


# -- folders ----------------------------------------------------------------------------------


def test_files_of_one_padded_shape_are_one_and_the_largest_file_names_it(tmp_path: Path) -> None:
    write_volumes(tmp_path, {"a": (30, 33, 9), "b": (32, 40, 16), "c": (8, 8, 8), "d": (9, 8, 8)})

    folder = read_folder(tmp_path, None, DIVISOR, "fcn")

    assert [(one.shape, one.requested, one.volumes) for one in folder.shapes] == [
        ((32, 40, 16), (32, 40, 16), ("b.nii", "a.nii")),
        ((16, 8, 8), (9, 8, 8), ("d.nii",)),
        ((8, 8, 8), (8, 8, 8), ("c.nii",)),
    ]
    assert folder.total == 4
    assert folder.median == (30, 33, 9)  # of 8 9 30 32, 8 8 33 40 and 8 8 9 16 the upper middle


def test_volumes_are_resampled_before_they_are_padded(tmp_path: Path) -> None:
    write_volumes(tmp_path, {"a": (30, 30, 20)})  # 1 x 1 x 2 mm

    folder = read_folder(tmp_path, "2,1.5,1", DIVISOR, "fcn")

    assert folder.sides == ((15, 20, 40),)
    assert [one.shape for one in folder.shapes] == [(16, 24, 40)]
    assert folder.spacing == (2.0, 1.5, 1.0)


def test_a_network_in_2d_and_a_volume_beyond_all_limits_are_refused(tmp_path: Path) -> None:
    write_volumes(tmp_path, {"a": (30, 30, 20)})

    with pytest.raises(MembenchError, match="flat takes slices of 2 sides"):
        read_folder(tmp_path, None, (8, 8), "flat")
    with pytest.raises(MembenchError, match=r"a\.nii would have .* over the limit"):
        read_folder(tmp_path, "0.001,0.001,0.001", DIVISOR, "fcn")


# -- shares -----------------------------------------------------------------------------------

SIDES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=80, deadline=None)
@given(st.lists(SIDES, min_size=1, max_size=25), st.integers(0, 1500), st.integers(0, 500))
def test_shares_are_those_that_simulating_every_shape_gives(
    steps: list[Shape], size: int, fixed: int
) -> None:
    folder = folder_of([tuple(8 * n for n in shape) for shape in steps])

    def needs(shape: Shape) -> int:  # longer sides cost more, slices more than the others
        x, y, slices = shape
        return (fixed * 512 + x * y * slices + 64 * slices * slices) // 512

    formula = Formula(needs)
    found = share_of(formula, folder, card_of(size))

    expected = {one.shape: needs(one.shape) <= size for one in folder.shapes}
    assert found.fits == expected
    assert found.fitting == sum(expected[pad_to(side, DIVISOR)] for side in folder.sides)
    assert {one.shape for one in found.rest} == {s for s, fits in expected.items() if not fits}
    assert found.monotonic
    assert len(set(formula.asked)) == len(formula.asked)  # nothing twice
    simulated = found.records
    for shape, fits in found.fits.items():  # each is one that was simulated, or follows from one
        beyond = [s for s in simulated if (within(shape, s) if fits else within(s, shape))]
        assert any((simulated[s].status == "ok") == fits for s in beyond)


def test_of_shapes_that_lie_within_one_another_two_or_three_are_simulated() -> None:
    folder = folder_of([(64, 64, 8 * n) for n in range(1, 101)])
    formula = Formula(per_voxel)

    found = share_of(formula, folder, card_of(per_voxel((64, 64, 8 * 37))))

    assert found.fitting == 37
    assert len(formula.asked) < 8  # bisection alone would take 7


def test_where_memory_falls_with_the_volume_every_shape_is_simulated() -> None:
    folder = folder_of([(64, 64, 8 * n) for n in range(1, 7)])
    odd = {16: 10, 24: 4, 32: 10, 40: 4}  # of these the even ones need too much, the others do not

    formula = Formula(lambda shape: odd.get(shape[2], 4))
    found = find_share(
        Readings(CASE, cast(Simulator, formula)),
        folder,
        card_of(5),
        first=[(64, 64, 32), (64, 64, 40)],
    )

    assert not found.monotonic
    assert [s[2] for s, fits in found.fits.items() if not fits] == [32, 16]
    assert set(found.records) == {one.shape for one in folder.shapes}


def test_what_is_known_from_elsewhere_is_not_simulated_again() -> None:
    folder = folder_of([(64, 64, 8 * n) for n in range(1, 7)])
    formula = Formula(per_voxel)

    known: dict[Shape, bool] = {(72, 64, 48): True}  # no shape of the folder, but larger than each
    found = find_share(
        Readings(CASE, cast(Simulator, formula)), folder, card_of(2**40), known=known
    )

    assert found.fitting == 6
    assert formula.asked == []


def test_a_volume_that_the_network_refuses_is_named() -> None:
    class Refuses(Formula):
        def _record(self, case: Case, card: Card) -> Record:
            if case.shape == (8, 8, 8):
                return make_record(status="failed", reason="one value", process_bytes=None)
            return super()._record(case, card)

    folder = folder_of([(64, 64, 64), (8, 8, 8)])
    search = FolderSearch(CASE, folder, cast(Simulator, Refuses(per_voxel)))

    with pytest.raises(MembenchError, match=r"volumes/v1\.nii: .*8x8x8: one value"):
        search.find(card_of(2**40))


def test_maxima_are_those_that_lie_within_no_other() -> None:
    shapes = [(8, 8, 8), (16, 8, 8), (8, 24, 8), (16, 8, 16), (8, 8, 16)]

    assert maxima(shapes) == [(8, 24, 8), (16, 8, 16)]


# -- the answer of a folder -------------------------------------------------------------------


def test_the_worst_is_the_one_that_needs_most_and_not_the_one_of_most_voxels() -> None:
    folder = folder_of([(80, 80, 80), (16, 16, 400), (16, 16, 16)])

    def needs(shape: Shape) -> int:
        return max(shape)

    fit = FolderSearch(CASE, folder, cast(Simulator, Formula(needs))).find(card_of(100))

    assert (fit.worst.volumes, fit.worst_needs_bytes) == (("v1.nii",), 400)
    assert (fit.shape, fit.share.fitting) == ((80, 80, 80), 2)
    assert fit.largest.next_shape == (16, 16, 400)
    assert fit.to_dict()["volumes"]["worst"] == {
        "volume": "v1.nii",
        "requested_shape": [16, 16, 400],
        "shape": [16, 16, 400],
        "needs_bytes": 400,
        "fits": False,
    }


def test_where_all_fit_there_is_no_patch_and_where_none_does_no_largest() -> None:
    folder = folder_of([(40, 40, 40), (24, 24, 24)])
    search = FolderSearch(CASE, folder, cast(Simulator, Formula(per_voxel)))

    every = search.find(card_of(per_voxel((40, 40, 40))))
    none = search.find(replace(card_of(per_voxel((16, 16, 16))), name="less-1gb"))

    assert (every.patch, every.shape, every.largest.next_shape) == (None, (40, 40, 40), None)
    assert (none.shape, none.case.shape, none.share.fitting) == (None, (24, 24, 24), 0)
    assert none.patch is not None
    assert none.patch.shape == (16, 16, 16)
    data = none.to_dict()
    assert (data["fits"], data["volumes"]["share"], data["volumes"]["fitting"]) == (False, 0.0, 0)
    assert data["volumes"]["largest_fitting"] is None


# -- patches ----------------------------------------------------------------------------------


def test_a_patch_loses_a_step_on_the_axis_that_is_largest_beside_the_median() -> None:
    # Relations to the median 100, 100, 40: at 96x96x40 the slices are the largest, 40/40; then x
    # and y, 0.96 each, of which the later goes first; then 32/40 = 0.8 is smaller than 0.88.
    found = patches((96, 96, 40), (100, 100, 40), DIVISOR)

    assert found[-1] == (96, 96, 40)
    assert found[-2] == (96, 96, 32)
    assert found[-3] == (96, 88, 32)
    assert found[-4] == (88, 88, 32)
    assert found[-5] == (88, 80, 32)
    assert found[0] == DIVISOR
    assert len(found) == 1 + 11 + 11 + 4  # every step down to one an axis


def test_the_largest_patch_that_fits_is_found_as_trying_all_finds_it() -> None:
    folder = folder_of([(200, 180, 90), (190, 200, 100), (220, 190, 30), (40, 40, 40)])
    limit = per_voxel((120, 112, 56))
    formula = Formula(per_voxel)
    readings = Readings(CASE, cast(Simulator, formula))
    share = find_share(readings, folder, card_of(limit))

    free = find_patch(readings, share, cast(Simulator, formula))
    inside = find_patch(readings, share, cast(Simulator, formula), within_all=True)

    assert len(rest_sides(share)) == 3
    assert folder.median == (200, 190, 90)
    path = patches((200, 184, 88), folder.median, DIVISOR)
    assert free is not None
    assert inside is not None
    assert free.shape == max((p for p in path if per_voxel(p) <= limit), key=math.prod)
    path = patches((184, 176, 24), folder.median, DIVISOR)  # 190, 180 and 30 are the shortest
    assert inside.shape == max((p for p in path if per_voxel(p) <= limit), key=math.prod)


def test_shapes_in_proportion_keep_it_and_are_multiples_of_the_divisor() -> None:
    cube, flat = in_proportion((128, 128, 128), (16,) * 3), in_proportion((100, 200, 50), DIVISOR)

    assert [cube(n) for n in (1, 2, 9)] == [(16, 16, 16), (32, 32, 32), (144, 144, 144)]
    # y is the longest: 8, 16 and 80 of it; the others are half and a quarter, rounded up.
    assert [flat(n) for n in (1, 2, 10)] == [(8, 8, 8), (8, 16, 8), (40, 80, 24)]


# -- readings ---------------------------------------------------------------------------------


def test_a_smaller_card_is_told_from_a_larger_one_only_where_that_is_certain() -> None:
    formula = Formula(lambda _shape: 40 * MIB, held_more=20 * MIB)
    readings = Readings(CASE, cast(Simulator, formula))
    large, enough, between, small = (
        replace(card_of(size * MIB), name=f"card-{size}gb") for size in (100, 60, 50, 39)
    )
    shape = (64, 64, 64)

    records = [readings.at(shape, card) for card in (large, enough, between, small)]

    assert [r.status for r in records] == ["ok", "ok", "ok", "oom"]
    reserved = [r.peak_reserved_bytes for r in records[:3]]
    assert reserved == [60 * MIB, 60 * MIB, 50 * MIB]
    assert records[1].process_bytes == 60 * MIB + enough.context_bytes
    assert records[3].process_bytes is None
    # 60 MiB are all that it held on 100; at 50 it would have gone another way; at 39 it cannot.
    assert formula.asked == [shape, shape]


def test_a_larger_card_is_not_told_from_a_smaller_one() -> None:
    formula = Formula(lambda _shape: 40 * MIB, held_more=20 * MIB)
    readings = Readings(CASE, cast(Simulator, formula))
    small, large = (replace(card_of(size * MIB), name=f"card-{size}gb") for size in (50, 100))

    reserved = [readings.at((64, 64, 64), card).peak_reserved_bytes for card in (small, large)]

    assert reserved == [50 * MIB, 60 * MIB]


def test_settings_of_the_allocator_make_every_card_be_simulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "garbage_collection_threshold:0.5")
    formula = Formula(lambda _shape: 40 * MIB)
    readings = Readings(CASE, cast(Simulator, formula))

    for size in (100, 60):
        readings.at((64, 64, 64), replace(card_of(size * MIB), name=f"card-{size}gb"))

    assert len(formula.asked) == 2


def test_a_users_network_is_given_its_image_at_the_other_shape() -> None:
    imported = Imported(
        reference="mine:Net", inputs=("2x4x128x128x64:float16", "2x7:int64"), classes=3
    )
    case = replace(CASE, network="mine:Net", imported=imported)

    moved = at_shape(case, (16, 32, 48), requested=(15, 32, 48))

    assert moved.imported is not None
    assert moved.imported.inputs == ("2x4x16x32x48:float16", "2x7:int64")
    assert (moved.shape, moved.requested_shape) == ((16, 32, 48), (15, 32, 48))
    assert moved.imported.classes == 3
