"""FLARE21's two-stage segmentation of abdominal CT as one pipeline, with its memory by stage."""

__all__: list[str] = []
