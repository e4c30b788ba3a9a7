"""Traces written for other people's viewers: PyTorch's memory page, Chrome and Perfetto."""

from bench.export.files import FORMATS, check_path, write_snapshot_file, write_trace

__all__ = ["FORMATS", "check_path", "write_snapshot_file", "write_trace"]
