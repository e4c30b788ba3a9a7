"""LaTeX tables: every figure, every mark escaped, and a document that compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from bench.errors import MembenchError
from bench.report.latex import latex_table, latex_text
from bench.report.markup import LATEX
from tests.bench.records import make_record, make_table1

ODD = 'a_b & 50% #1 $x$ {y} ~^ \\z <w> [v] "u" |t|'
DOCUMENT = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage{booktabs,graphicx}
\begin{document}
\input{table.tex}
\end{document}
"""


def balanced(text: str) -> bool:
    """Whether environments and braces close in order, escaped braces aside."""
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        elif opened.pop() != name:
            return False
    bare = re.sub(r"\\[{}\\]", "", text)
    return not opened and bare.count("{") == bare.count("}")


def test_the_tables_are_of_booktabs_with_every_case() -> None:
    text = latex_text("table1", make_table1())
    assert balanced(text)
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 2
    assert r"\textbf{26.6 GiB}, 1.00\\paper 28.4 GB" in text
    assert text.count(r"ccblock+inplace\_abn") == 1 * 2 + 3 * 2  # a row a variant, then one a case
    assert r"\label{tab:table1-1}" in text
    assert "predicted (cuda-shim)" in text


def test_every_row_has_as_many_cells_as_there_are_columns() -> None:
    for line_of in latex_text("table1", make_table1()).split(r"\begin{tabular}")[1:]:
        columns = re.match(r"\{([lr]+)\}", line_of)
        assert columns is not None
        body = line_of[line_of.index(r"\toprule") : line_of.index(r"\bottomrule")]
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {line.count(" & ") + 1 for line in rows} == {len(columns[1])}


def test_marks_are_escaped() -> None:
    assert LATEX.text("a_b 5% #1 & {x} $") == r"a\_b 5\% \#1 \& \{x\} \$"
    assert LATEX.text("~^\\") == r"\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert LATEX.text("96³ <1>") == r"96\textsuperscript{3} \textless{}1\textgreater{}"


def test_a_long_table_goes_on_in_the_next() -> None:
    frame = pd.DataFrame({"variant": [str(i) for i in range(41)]})
    first, second = latex_table(frame, 1, "All", "tab:x")
    assert first.count(r" \\") == 41  # the head and 40 rows
    assert second.count(r" \\") == 2
    assert "(continued)" in second
    assert second.count(r"\label") == 0


def test_no_records_are_an_error() -> None:
    with pytest.raises(MembenchError, match="no records to report on"):
        latex_text("table1", [])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_a_document_with_the_tables_compiles(tmp_path: Path) -> None:
    records = [*make_table1(), make_record(variant=ODD, network=ODD, card=ODD, position=50)]
    (tmp_path / "table.tex").write_text(latex_text(ODD, records), encoding="utf-8")
    (tmp_path / "main.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
