from __future__ import annotations

import pytest

from bench.errors import MembenchError
from bench.predict.alloc_conf import AllocatorSettings, parse_alloc_conf, settings_from_snapshot
from bench.units import MIB


@pytest.mark.parametrize("text", ["", "  ", "pinned_num_register_threads:8,backend:native"])
def test_options_that_move_no_block_leave_the_defaults(text: str) -> None:
    assert parse_alloc_conf(text) == AllocatorSettings()


def test_every_option_is_read() -> None:
    text = (
        "expandable_segments:True, max_split_size_mb:128,max_non_split_rounding_mb:40,"
        "garbage_collection_threshold:0.8,per_process_memory_fraction:0.5,"
        "roundup_power2_divisions:4"
    )
    assert parse_alloc_conf(text) == AllocatorSettings(
        expandable_segments=True,
        max_split_size_bytes=128 * MIB,
        max_non_split_rounding_bytes=40 * MIB,
        garbage_collection_threshold=0.8,
        per_process_memory_fraction=0.5,
        roundup_power2_divisions=(4,) * 16,
    )


def test_the_large_segment_size_also_sets_the_default_rounding() -> None:
    settings = parse_alloc_conf("large_segment_size_mb:32")
    assert settings.large_segment_size_bytes == 32 * MIB
    assert settings.max_non_split_rounding_bytes == 32 * MIB


def test_divisions_by_interval_hold_below_the_first_and_above_the_last() -> None:
    """The string of PyTorch's own unit test, 64 MiB being interval 6."""
    text = "roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1]"
    assert parse_alloc_conf(text).roundup_power2_divisions == (
        *(8,) * 7,  # 1 to 64 MiB
        2,  # 128
        4,  # 256
        2,  # 512
        4,  # 1024
        *(1,) * 5,
    )


def test_an_interval_that_is_not_named_is_not_rounded() -> None:
    divisions = parse_alloc_conf("roundup_power2_divisions:[1:2,4:8]").roundup_power2_divisions
    assert divisions == (2, 0, 8, *(0,) * 13)


def test_all_divisions_zero_are_the_same_as_none() -> None:
    assert parse_alloc_conf("roundup_power2_divisions:[256:0]") == AllocatorSettings()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("max_split_size:128", "did you mean 'max_split_size_mb'"),
        ("max_split_size_mb:19", "at least 20"),
        ("large_segment_size_mb:32,max_split_size_mb:31", "at least 32"),
        ("max_non_split_rounding_mb:19", "at least 20"),
        ("large_segment_size_mb:10", "at least 11"),
        ("max_split_size_mb:lots", "'lots' is not a whole number"),
        ("max_split_size_mb:-1", "not a whole number"),
        ("max_split_size_mb:²0", "not a whole number"),
        ("max_split_size_mb", "write max_split_size_mb:<value>"),
        ("max_split_size_mb:", "write max_split_size_mb:<value>"),
        ("expandable_segments:true", "True or False"),
        ("garbage_collection_threshold:0", "between 0 and 1"),
        ("garbage_collection_threshold:1.0", "between 0 and 1"),
        ("garbage_collection_threshold:nan", "between 0 and 1"),
        ("garbage_collection_threshold:x", "must be a number"),
        ("per_process_memory_fraction:1.5", "between 0 and 1"),
        ("roundup_power2_divisions:3", "3 is not a power of two"),
        ("roundup_power2_divisions:0", "0 is not a power of two"),
        ("roundup_power2_divisions:[3:4]", "3 is not a power of two"),
        ("roundup_power2_divisions:[4:3]", "3 is not a power of two"),
        ("roundup_power2_divisions:[4]", "not a whole number"),
        ("roundup_power2_divisions:[4:4", "brackets do not match"),
        ("roundup_power2_divisions:4]", "brackets do not match"),
        ("roundup_power2_divisions:[[4:4]]", "brackets do not match"),
        ("backend:cudaMallocAsync", "only the native backend"),
        ("expandable_segments:True,,", "an option is missing"),
        (",", "an option is missing"),
        ("release_lock_on_cudamalloc:1", "True or False"),
        ("pinned_use_background_threads:yes", "True or False"),
        ("pinned_num_register_threads:3", "3 is not a power of two"),
        ("pinned_num_register_threads:256", "at most 128"),
        ("pinned_reserve_segment_size_mb:0", "at least 1"),
        ("pinned_max_cached_size_mb:x", "'x' is not a whole number"),
    ],
)
def test_what_pytorch_would_refuse_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(MembenchError, match=why) as caught:
        parse_alloc_conf(text)
    assert str(caught.value).startswith("PYTORCH_ALLOC_CONF: cannot use")


def test_a_comma_at_the_end_says_nothing_as_in_pytorch() -> None:
    assert parse_alloc_conf("expandable_segments:True,") == parse_alloc_conf(
        "expandable_segments:True"
    )
    assert parse_alloc_conf("roundup_power2_divisions:[8:4,]") == parse_alloc_conf(
        "roundup_power2_divisions:[8:4]"
    )
    assert parse_alloc_conf("roundup_power2_divisions:[]") == AllocatorSettings()


@pytest.mark.parametrize("text", ["throw_on_cudamalloc_oom:True", "per_process_memory_fraction:0"])
def test_what_pytorch_takes_and_is_not_simulated_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(MembenchError, match="cannot use"):
        parse_alloc_conf(text)
    assert parse_alloc_conf("throw_on_cudamalloc_oom:False") == AllocatorSettings()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "expandable_segments:True,large_segment_size_mb:12",
        "max_split_size_mb:64,max_non_split_rounding_mb:100",
        "large_segment_size_mb:32,max_non_split_rounding_mb:40",
        "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
        "garbage_collection_threshold:0.6,per_process_memory_fraction:0.75",
    ],
)
def test_settings_written_as_a_string_read_back_the_same(text: str) -> None:
    settings = parse_alloc_conf(text)
    assert parse_alloc_conf(settings.to_conf()) == settings


def test_defaults_are_written_as_nothing() -> None:
    assert AllocatorSettings().to_conf() == ""


def test_a_snapshots_own_values_win_over_its_string() -> None:
    """The string is the last one set; what it left out is back at its default."""
    settings = settings_from_snapshot(
        {
            "PYTORCH_CUDA_ALLOC_CONF": "large_segment_size_mb:24,max_split_size_mb:64",
            "max_split_size": 128 * MIB,
            "garbage_collection_threshold": 0.5,
            "expandable_segments": True,
            "roundup_power2_divisions": {str(2**i): 2 if i < 3 else 0 for i in range(16)},
        }
    )
    assert settings == AllocatorSettings(
        max_split_size_bytes=128 * MIB,
        max_non_split_rounding_bytes=24 * MIB,
        garbage_collection_threshold=0.5,
        expandable_segments=True,
        roundup_power2_divisions=(2, 2, 2, *(0,) * 13),
        large_segment_size_bytes=24 * MIB,
    )


@pytest.mark.parametrize("unlimited", [-1, 2**64 - 1, 2**63])
def test_a_snapshots_word_for_no_limit_is_no_limit(unlimited: int) -> None:
    assert settings_from_snapshot({"max_split_size": unlimited}) == AllocatorSettings()


@pytest.mark.parametrize(
    "recorded",
    [
        {"max_split_size": "big"},
        {"max_split_size": None},
        {"garbage_collection_threshold": []},
        {"roundup_power2_divisions": [1, 2]},
        {"roundup_power2_divisions": {"x": 1}},
        {"max_split_size": float("inf")},
    ],
)
def test_settings_of_the_wrong_kind_are_refused(recorded: dict[str, object]) -> None:
    with pytest.raises(MembenchError, match="allocator settings cannot be read"):
        settings_from_snapshot(recorded)
