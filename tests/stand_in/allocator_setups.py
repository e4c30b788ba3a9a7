"""Settings, devices and shares of them under which both allocators run the same programs."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["GIB", "MIB", "SETUPS", "Setup"]

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A process of PyTorch: its settings and its device; one program of two has the share."""

    conf: str = ""
    total: int = 16 * GIB
    capacity: int = 16 * GIB  # what the rest of the device's memory leaves
    fraction: float = 1.0
    largest: int = 300 * MIB
    pools: int = 0  # private ones, besides the default one
    switches: bool = False  # expandable segments are turned on and off as it runs


_TIGHT = Setup(total=1 * GIB, capacity=400 * MIB, largest=120 * MIB)
_SHARE = Setup(total=1 * GIB, capacity=1 * GIB, fraction=0.3, largest=120 * MIB)
SETUPS: dict[str, Setup] = {
    "default": Setup(),
    "tight": _TIGHT,
    "share": _SHARE,
    "pools": Setup(pools=2),
    "pools tight": replace(_TIGHT, pools=1),
    "pools expandable": replace(_TIGHT, conf="expandable_segments:True", pools=1),
    "pools collect": replace(_SHARE, conf="garbage_collection_threshold:0.3", pools=1),
    "pools split": replace(_TIGHT, conf="max_split_size_mb:24", pools=1),
    "switching": Setup(switches=True),
    "switching tight": replace(_TIGHT, switches=True),
    "switching share": replace(_SHARE, switches=True),
    "expandable": Setup(conf="expandable_segments:True"),
    "expandable tight": replace(_TIGHT, conf="expandable_segments:True"),
    "expandable share": replace(_SHARE, conf="expandable_segments:True"),
    "split": Setup(conf="max_split_size_mb:32"),
    "split tight": replace(_TIGHT, conf="max_split_size_mb:20"),
    "split share": replace(_SHARE, conf="max_split_size_mb:64"),
    "split rounding": replace(_TIGHT, conf="max_split_size_mb:32,max_non_split_rounding_mb:40"),
    "rounding": Setup(conf="roundup_power2_divisions:4"),
    "rounding list": replace(_TIGHT, conf="roundup_power2_divisions:[2:8,16:1,32:4,64:2,>:0]"),
    "rounding list above": replace(_TIGHT, conf="roundup_power2_divisions:[1:4,8:2,>:8]"),
    "collect": replace(_SHARE, conf="garbage_collection_threshold:0.5"),
    "collect early": replace(_SHARE, conf="garbage_collection_threshold:0.1", fraction=0.4),
    "collect unshared": replace(_TIGHT, conf="garbage_collection_threshold:0.1"),
    "collect whole share": replace(
        _TIGHT, conf="garbage_collection_threshold:0.1,per_process_memory_fraction:1.0"
    ),
    "collect and split": replace(
        _SHARE, conf="garbage_collection_threshold:0.6,max_split_size_mb:24"
    ),
    "collect expandable": replace(
        _SHARE, conf="garbage_collection_threshold:0.4,expandable_segments:True"
    ),
    "share by setting": replace(_SHARE, conf="per_process_memory_fraction:0.25", fraction=1.0),
    "large segments": replace(_TIGHT, conf="large_segment_size_mb:64"),
    "large segments split": replace(_TIGHT, conf="max_split_size_mb:48,large_segment_size_mb:40"),
    "small segments split": replace(_TIGHT, conf="large_segment_size_mb:12,max_split_size_mb:14"),
    "small segments rounding": replace(
        _TIGHT,
        conf="max_split_size_mb:16,max_non_split_rounding_mb:14,large_segment_size_mb:12",
    ),
    "odd segments": replace(_TIGHT, conf="large_segment_size_mb:13", capacity=130 * MIB),
    "odd pages": replace(
        _TIGHT, conf="large_segment_size_mb:13,expandable_segments:True", capacity=130 * MIB
    ),
    "small segments": replace(_TIGHT, conf="large_segment_size_mb:12"),
    "large pages": replace(_TIGHT, conf="large_segment_size_mb:32,expandable_segments:True"),
    "small pages": replace(_TIGHT, conf="expandable_segments:True,large_segment_size_mb:12"),
    "split expandable": replace(_TIGHT, conf="expandable_segments:True,max_split_size_mb:24"),
    "everything": replace(
        _SHARE,
        conf="expandable_segments:True,max_split_size_mb:40,roundup_power2_divisions:[16:4,>:2],"
        "garbage_collection_threshold:0.7",
    ),
    "all but pages": replace(
        _SHARE,
        conf="max_split_size_mb:70,large_segment_size_mb:30,roundup_power2_divisions:8,"
        "garbage_collection_threshold:0.7",
    ),
}
