"""From records to what people read: a table on the terminal, markdown with plots in a folder."""

from bench.report.results import read_results
from bench.report.rows import Row, Section, Table, make_tables
from bench.report.terminal import results_table

__all__ = ["Row", "Section", "Table", "make_tables", "read_results", "results_table"]
