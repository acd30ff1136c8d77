"""README's tables of quality are those of the records."""

import sys
from pathlib import Path

import pytest

import w4a8jax

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import report_table


@pytest.mark.parametrize("model", report_table.MODELS)
def test_readme_has_the_records_tables(model):
    readme = report_table.README.read_text(encoding="utf-8")
    report = w4a8jax.Report.read(report_table.RESULTS / f"report_{model}.json")
    text = report_table.table_of(report)
    assert report_table.written(readme, model, text) == readme
    assert text.count("\n| ") >= len(report.measured)
    assert report_table.written(readme, model, "other") != readme


def test_the_documents_are_the_records():
    for model in report_table.MODELS:
        path = report_table.RESULTS / f"report_{model}.json"
        document = path.with_suffix(".md").read_text(encoding="utf-8")
        assert document == w4a8jax.Report.read(path).to_markdown(f"report_{model}.png")
