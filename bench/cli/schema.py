"""``membench schema``: the JSON schema of a suite file."""

from __future__ import annotations

from bench.cli.console import user_errors

__all__ = ["schema"]


def schema() -> None:
    """Print the JSON schema of a suite file, for editors that check YAML."""
    with user_errors():
        import json

        from bench.suite import suite_json_schema

        print(json.dumps(suite_json_schema(), indent=2))
