"""Cards as data: the shipped ones, the user's, and the names of real GPUs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.errors import MembenchError
from bench.predict import card as card_module
from bench.predict.cards import (
    Card,
    all_cards,
    budget_card,
    card_name_for_gpu,
    find_card,
    user_cards_folder,
)
from bench.predict.shim import TorchBuild

BUILD = TorchBuild(Path("torch"), version="", git_version="", cuda=None, hip=None)
MIB = 1 << 20
GIB = 1 << 30
SHIPPED = {
    *("gtx1070-8gb", "quadrortx4000-8gb", "rtx3080-10gb", "rtx4060-8gb", "rtx4070ti-12gb"),
    *("rtx3070-8gb", "rtxa4000-16gb", "rtxa5000-24gb", "rtx6000ada-48gb"),
    *("titanx-12gb", "p100-16gb", "gtx1080ti-11gb", "v100-16gb", "v100-32gb", "t4-16gb"),
    *("rtx2080ti-11gb", "titanrtx-24gb", "rtx3060-12gb", "rtx3090-24gb", "rtx4090-24gb"),
    *("rtx5090-32gb", "a10-24gb", "l4-24gb", "a40-48gb", "rtxa6000-48gb", "l40s-48gb"),
    *("a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "b200-180gb"),
}


@pytest.fixture(autouse=True)
def own_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of own cards, so that those of whoever runs the tests do not count."""
    folder = tmp_path / "cards"
    folder.mkdir()
    monkeypatch.setenv("MEMBENCH_CARDS", str(folder))
    return folder


def as_data(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(find_card(name).to_dict()))
    return data


def write(folder: Path, data: dict[str, Any], name: str | None = None) -> Path:
    path = folder / f"{name or data['name']}.json"
    path.write_text(json.dumps(data))
    return path


def test_the_shipped_cards_are_these() -> None:
    assert set(all_cards()) == SHIPPED
    assert len(SHIPPED) >= 30


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_card_has_nearly_the_memory_of_its_name(name: str) -> None:
    """Never more than it is sold with, and less by ECC's sixteenth and the driver's share."""
    marketed_bytes = int(name.rpartition("-")[2].removesuffix("gb")) * GIB

    assert 0.875 * marketed_bytes < find_card(name).memory_bytes <= marketed_bytes


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_context_follows_the_rule_that_its_source_states(name: str) -> None:
    card = find_card(name)
    match = re.search(
        r"3 MiB for each of the (\d+) multiprocessors, and 128 MiB", card.context_source
    )

    assert match is not None
    assert card.context_bytes == (3 * int(match[1]) + 128) * MIB


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_operands_are_copied_where_tensor_cores_read_them(name: str) -> None:
    """float32 from capability 8.0 on (TF32), half precision from 7.0 on; nothing before."""
    card = find_card(name)
    workspace = card.convolution_workspace

    assert workspace.float32.operand_fraction == (0.5 if card.compute_capability >= (8, 0) else 0.0)
    assert workspace.half.operand_fraction == (0.5 if card.compute_capability >= (7, 0) else 0.0)
    assert "assumption" in workspace.source
    assert card.calibration is None


def test_the_convolution_workspace_is_the_floor_and_the_fraction_of_the_operands() -> None:
    v100 = find_card("v100-32gb")

    assert v100.convolution_workspace_bytes("float32", 1_000) == 32 * MIB
    assert v100.convolution_workspace_bytes("half", 1_000) == 32 * MIB + 500


@pytest.mark.parametrize(
    ("name", "torch_2_11", "torch_2_13"),
    [
        ("v100-32gb", 8_519_680, 8_519_680),  # 2 * 4096 KiB + 8 * 16 KiB
        ("rtx4090-24gb", 8_519_680, 8_519_680),
        ("h200-141gb", 33_554_432, 33_554_432),  # 32 MiB
        ("b200-180gb", 8_519_680, 33_554_432),
        ("rtx5090-32gb", 8_519_680, 33_554_432),
    ],
)
def test_the_cublas_workspace_grows_at_capability_9_and_with_torch_2_12_beyond(
    name: str, torch_2_11: int, torch_2_13: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As read with both on a device of each capability, after one small matrix product."""
    for release, expected in (((2, 11), torch_2_11), ((2, 13), torch_2_13)):
        monkeypatch.setattr(card_module, "_installed_torch", lambda release=release: release)
        assert find_card(name).cublas_workspace_bytes == expected


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.11.0+cu130", (2, 11)), ("2.13.0a0+git", (2, 13)), ("unknown", (2, 12)), (None, (2, 12))],
)
def test_the_torch_that_is_here_is_asked_by_its_files(
    version: str | None, release: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = version and dataclasses.replace(BUILD, version=version)
    monkeypatch.setattr(card_module, "torch_build", lambda: found)
    assert card_module._installed_torch.__wrapped__() == release


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_context_says_which_cuda_it_is_from_and_where_that_stands(name: str) -> None:
    card = find_card(name)

    assert re.fullmatch(r"1[0-9]\.[0-9]", card.context_cuda)
    assert card.context_cuda.replace(".", "") in card.context_cuda_source  # 130 in "+cu130"
    assert "#" in card.context_cuda_source


def test_the_cuda_version_is_no_part_of_what_records_are_compared_by() -> None:
    """Records from before the field was there would else be of another card."""
    card = find_card("v100-32gb")

    assert dataclasses.replace(card, context_cuda="11.8").digest() == card.digest()
    assert dataclasses.replace(card, context_bytes=1).digest() != card.digest()


def test_a_card_that_does_not_say_its_cuda_version_is_read(own_cards: Path) -> None:
    data = as_data("v100-32gb")
    del data["context_cuda"], data["context_cuda_source"]
    write(own_cards, data)

    assert find_card("v100-32gb").context_cuda == ""
    write(own_cards, data | {"context_cuda": 12.8})
    with pytest.raises(MembenchError, match=r"'context_cuda' must be a text, got 12\.8"):
        find_card("v100-32gb")


@pytest.mark.parametrize("size", [1, GIB, 20 * GIB, 1_500_000_000, 10**12])
def test_a_budget_is_found_again_by_its_name(size: int) -> None:
    card = budget_card(size)

    assert find_card(card.name) == card
    assert card.memory_bytes == max(size, card.context_bytes + 1)
    assert card.context_bytes == find_card("a100-80gb").context_bytes


def test_a_budget_says_its_bytes_to_the_last(own_cards: Path) -> None:
    assert budget_card(20 * GIB).name == "budget-20gb"
    assert budget_card(20 * GIB + 1).name == f"budget-{20 * GIB + 1}b-21gb"
    for name in ("budget-0gb", "budget-5b-7gb", f"budget-{GIB}b-1gb", "budget-20gib"):
        with pytest.raises(MembenchError, match="no card is called"):
            find_card(name)
    write(own_cards, as_data("v100-32gb") | {"name": "budget-20gb"})
    assert find_card("budget-20gb").model == find_card("v100-32gb").model


def test_the_allocator_may_use_the_memory_less_the_context() -> None:
    # V100 SXM2 32 GB: 34,072,559,616 bytes; 3 * 80 + 128 = 368 MiB of context
    assert find_card("v100-32gb").capacity_bytes == 34_072_559_616 - 368 * MIB


def test_a_card_survives_json() -> None:
    for card in all_cards().values():
        assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_an_unknown_card_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(MembenchError, match=r"'v100-32'.*did you mean 'v100-32gb'"):
        find_card("v100-32")


def test_an_own_card_takes_the_place_of_a_shipped_one(own_cards: Path) -> None:
    write(own_cards, as_data("v100-32gb") | {"context_bytes": 300 * MIB})

    assert find_card("v100-32gb").context_bytes == 300 * MIB
    assert set(all_cards()) == SHIPPED


def test_an_own_card_is_added(own_cards: Path) -> None:
    calibration = {"whatever": ["was", "measured"]}
    write(own_cards, as_data("a40-48gb") | {"name": "a16-16gb", "calibration": calibration})

    assert find_card("a16-16gb").calibration == calibration
    assert set(all_cards()) == SHIPPED | {"a16-16gb"}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "memory_bytes",
            "32 GB",
            "field 'memory_bytes' must be a whole number of bytes, got '32 GB'",
        ),
        ("memory_bytes", True, "'memory_bytes' must be a whole number"),
        ("memory_bytes", -1, "'memory_bytes' must be a whole number"),
        ("model", " ", "'model' must be a text"),
        ("compute_capability", [7], "'compute_capability' must be two whole numbers"),
        ("compute_capability", 7.0, "'compute_capability' must be two whole numbers"),
        ("context_bytes", 40 * GIB, "'context_bytes' must be less than memory_bytes"),
        ("convolution_workspace", 3, "field 'convolution_workspace' must be a JSON object, got 3"),
        ("calibration", "yes", "'calibration' must be a JSON object or null"),
        ("memory_byte", 3, r"'memory_byte' is not known \(did you mean 'memory_bytes'"),
        ("name", "V100 32GB", "field 'name' must be a name such as"),
    ],
)
def test_a_broken_own_card_is_named_with_its_file_and_field(
    own_cards: Path, field: str, value: object, says: str
) -> None:
    path = write(own_cards, as_data("v100-32gb") | {field: value}, name="v100-32gb")

    with pytest.raises(MembenchError, match=says) as caught:
        find_card("h200-141gb")  # any card: a broken file is never passed over in silence
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.5, "1", True, float("nan"), float("inf")])
def test_a_broken_field_inside_an_object_is_named_in_full(own_cards: Path, value: object) -> None:
    data = as_data("v100-32gb")
    data["convolution_workspace"]["half"]["operand_fraction"] = value
    write(own_cards, data)

    with pytest.raises(MembenchError, match=r"'convolution_workspace\.half\.operand_fraction'"):
        all_cards()


@pytest.mark.parametrize("field", ["name", "memory_source", "context_source", "memory_bytes"])
def test_a_missing_field_is_named(own_cards: Path, field: str) -> None:
    data = as_data("v100-32gb")
    del data[field]
    write(own_cards, data, name="v100-32gb")

    with pytest.raises(MembenchError, match=f"field '{field}' must be .*it is missing"):
        all_cards()


def test_an_unknown_field_inside_an_object_is_named(own_cards: Path) -> None:
    data = as_data("v100-32gb")
    data["convolution_workspace"]["int8"] = {}
    write(own_cards, data)

    with pytest.raises(MembenchError, match=r"'convolution_workspace\.int8' is not known"):
        all_cards()


def test_a_card_file_that_is_not_json_is_named(own_cards: Path) -> None:
    path = own_cards / "mine-8gb.json"
    path.write_text("{not json")

    with pytest.raises(MembenchError, match="cannot be read") as caught:
        all_cards()
    assert str(path) in str(caught.value)


def test_a_card_file_that_is_nested_beyond_reason_is_named(own_cards: Path) -> None:
    (own_cards / "mine-8gb.json").write_text("[" * 100_000)

    with pytest.raises(MembenchError, match=r"mine-8gb\.json: the card cannot be read"):
        all_cards()


def test_a_folder_of_own_cards_that_cannot_be_searched_holds_none(
    own_cards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def glob(folder: Path, pattern: str) -> list[Path]:  # root is never refused
        if folder == own_cards:
            raise PermissionError(13, "Permission denied")
        return list(folder.rglob(pattern))

    monkeypatch.setattr(Path, "glob", glob)
    assert "v100-32gb" in all_cards()


def test_own_cards_in_the_home_of_nobody_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMBENCH_CARDS", "~no-such-user/cards")
    with pytest.raises(MembenchError, match="MEMBENCH_CARDS=~no-such-user/cards: that home"):
        user_cards_folder()


def test_a_user_without_a_home_has_no_own_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEMBENCH_CARDS")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert "v100-32gb" in all_cards()


def test_a_card_file_must_hold_an_object(own_cards: Path) -> None:
    (own_cards / "mine-8gb.json").write_text("[]")

    with pytest.raises(MembenchError, match="the file must be a JSON object"):
        all_cards()


def test_a_card_file_must_bear_the_name_of_its_card(own_cards: Path) -> None:
    write(own_cards, as_data("v100-32gb"), name="my-card")

    with pytest.raises(MembenchError, match="'v100-32gb'; name the file after it"):
        all_cards()


def test_own_cards_come_from_the_first_folder_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/settings")

    monkeypatch.setenv("MEMBENCH_CARDS", "/cards")
    assert user_cards_folder() == Path("/cards")
    monkeypatch.delenv("MEMBENCH_CARDS")
    assert user_cards_folder() == Path("/settings/membench/cards")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert user_cards_folder() == Path("/home/somebody/.config/membench/cards")


@pytest.mark.parametrize(
    ("gpu", "memory_mib", "card"),
    [
        # as nvidia-smi gives name and total
        ("NVIDIA H200", 143_771, "h200-141gb"),
        ("NVIDIA GeForce RTX 4090", 24_564, "rtx4090-24gb"),
        ("NVIDIA A100-SXM4-80GB", 81_920, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40_960, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 81_920, "a100-80gb"),
        ("Tesla V100-SXM2-32GB", 32_510, "v100-32gb"),
        ("Tesla V100-PCIE-16GB", 16_160, "v100-16gb"),
        ("Tesla T4", 15_360, "t4-16gb"),
        ("NVIDIA L4", 23_034, "l4-24gb"),
        ("NVIDIA L40S", 46_068, "l40s-48gb"),
        ("NVIDIA TITAN X (Pascal)", 12_193, "titanx-12gb"),
        ("NVIDIA H100 80GB HBM3", 81_559, "h100-80gb"),
        ("NVIDIA B200", 183_359, "b200-180gb"),
        # not known: by the same rule
        ("NVIDIA H100 NVL", 95_830, "h100-94gb"),
        ("GeForce GTX TITAN X", 12_207, "gtxtitanx-12gb"),
        ("NVIDIA RTX 6000 Ada Generation", 49_140, "rtx6000ada-48gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16_376, "rtx4090laptop-16gb"),
        ("NVIDIA A10G", 23_028, "a10g-24gb"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4_864, "a100mig-5gb"),
        ("NVIDIA Something", 55 * 1024, "something-55gb"),
        ("NVIDIA", 100, "gpu-1gb"),
    ],
)
def test_a_gpu_gets_its_cards_name(gpu: str, memory_mib: int, card: str) -> None:
    assert card_name_for_gpu(gpu, memory_mib * MIB) == card


def test_every_shipped_card_is_found_by_its_own_model_and_memory() -> None:
    for card in all_cards().values():
        assert card_name_for_gpu(card.model, card.memory_bytes) == card.name
