"""How the stand-in GPU poses: a card's figures, never a card's name, and no record of it kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.errors import MembenchError
from bench.predict.cards import all_cards, find_card
from bench.record import read_records
from tests.stand_in.build import LIBRARIES
from tests.stand_in.pose import NAME, environment, stand_in_card, write_card

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    folder = tmp_path / "libraries"
    folder.mkdir()
    for name in LIBRARIES:
        (folder / f"{name}.so.13").touch()
    return folder


def posing(libraries: Path, card: str = "v100-32gb", **given: str) -> dict[str, str]:
    return environment(libraries, libraries.parent / "state", card, given)


def test_it_takes_memory_capability_and_multiprocessors_of_the_card(libraries: Path) -> None:
    found = posing(libraries)

    assert found["STANDIN_MEMORY_BYTES"] == str(find_card("v100-32gb").memory_bytes)
    assert found["STANDIN_CAPABILITY"] == "70"
    assert found["STANDIN_MULTIPROCESSORS"] == str(find_card("v100-32gb").multiprocessors) == "80"
    assert found["STANDIN_STATE"] == str(libraries.parent / "state")


def test_what_the_user_set_stands_above_the_card(libraries: Path) -> None:
    found = posing(
        libraries, STANDIN_MEMORY_BYTES=str(8 << 30), STANDIN_CONTEXT_BYTES="1000", OTHER="kept"
    )

    assert found["STANDIN_MEMORY_BYTES"] == str(8 << 30)
    assert found["OTHER"] == "kept"
    (path,) = Path(found["MEMBENCH_CARDS"]).iterdir()
    written = json.loads(path.read_text())
    assert (written["memory_bytes"], written["context_bytes"]) == (8 << 30, 1000)


def test_every_library_is_preloaded_before_the_users_own(libraries: Path) -> None:
    found = posing(libraries, LD_PRELOAD="/lib/mine.so", PYTHONPATH="/mine")

    assert found["LD_PRELOAD"].split(":") == [
        *(str(libraries / f"{name}.so.13") for name in LIBRARIES),
        "/lib/mine.so",
    ]
    assert found["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/mine"])
    assert found["TRITON_LIBCUDA_PATH"] == str(libraries)


def test_a_card_that_is_not_known_is_refused(libraries: Path) -> None:
    with pytest.raises(MembenchError, match="no card is called 'v100-33gb'"):
        posing(libraries, "v100-33gb")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("STANDIN_MEMORY_BYTES", "32 GiB", "must be a whole number, got '32 GiB'"),
        ("STANDIN_FILL", "-1", "must be a whole number, got '-1'"),
        ("STANDIN_PIDS", "none", "must be one of own, host, hidden, got 'none'"),
        ("STANDIN_CONTEXT", "1", "no setting of the stand-in .*STANDIN_CONTEXT_BYTES"),
    ],
)
def test_a_setting_that_is_none_is_refused(
    libraries: Path, name: str, value: str, said: str
) -> None:
    with pytest.raises(MembenchError, match=f"{name} .*{said}|{name} is {said}"):
        posing(libraries, **{name: value})


@pytest.mark.parametrize(("given", "count"), [({}, 132), ({"STANDIN_MULTIPROCESSORS": "7"}, 7)])
def test_prediction_for_the_stand_in_takes_its_multiprocessors(
    libraries: Path, given: dict[str, str], count: int
) -> None:
    found = posing(libraries, "h200-141gb", **given)

    assert found["STANDIN_MULTIPROCESSORS"] == str(count)
    (path,) = Path(found["MEMBENCH_CARDS"]).iterdir()
    assert json.loads(path.read_text())["multiprocessors"] == count


def test_its_card_has_no_workspace_and_the_name_of_no_card_on_sale() -> None:
    shipped = set(all_cards())
    for name in shipped:
        posed = find_card(name)
        card = stand_in_card(posed, memory_bytes=posed.memory_bytes, context_bytes=0)

        assert card.name.startswith("standin-")
        assert card.name not in shipped
        assert card.compute_capability == posed.compute_capability
        assert card.capacity_bytes == posed.memory_bytes
        assert card.convolution_workspace_bytes("float32", 1 << 30) == 0
        assert card.convolution_workspace_bytes("half", 1 << 30) == 0


def test_the_written_card_is_one_that_prediction_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMBENCH_CARDS", str(tmp_path))
    write_card("t4-16gb", 1 << 34, 512, tmp_path)

    card = find_card("standin-16gb")
    assert (card.model, card.memory_bytes, card.context_bytes) == (NAME, 1 << 34, 512)


def test_no_committed_record_was_made_on_a_stand_in() -> None:
    """``results`` holds what GPUs measured, and predictions for cards on sale."""
    files = sorted((ROOT / "results").rglob("*.jsonl"))
    records = [r for f in files if f.parent.name != "parity" for r in read_records(f)]

    assert len(records) > 100
    made = [r.case for r in records if (r.environment.gpu or "").startswith("stand-in")]
    cards = [r.case for r in records if (r.card or "").startswith("standin")]
    assert (made, cards) == ([], [])
