"""The papers' training recipes, made runnable on anybody's volumes."""

__all__: list[str] = []
