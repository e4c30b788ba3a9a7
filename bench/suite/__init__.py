"""Suites: YAML files that choose networks, techniques and shapes, read into cases."""

from bench.suite.load import Suite, load_suite, shipped_suites, suite_json_schema

__all__ = ["Suite", "load_suite", "shipped_suites", "suite_json_schema"]
