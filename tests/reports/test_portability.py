from __future__ import annotations

from pathlib import Path

from tests.tiny import World
from toolkit.reports.portability import SETTINGS
from toolkit.reports.schema import Report, Share
from toolkit.reports.summary import render_summary


def test_the_summary_warns_of_labels_that_change_elsewhere(hardened: World) -> None:
    """The tiny world's labels change nowhere; a row of its report is made to say so."""
    report = Report.model_validate_json((hardened.bundle / "report.json").read_text())
    found = report.quantization.elsewhere
    assert found is not None
    changed = Share(correct=9, total=150, value=0.06, low=0.03, high=0.11)
    rows = [row.model_copy(update={"warning": row.setting == "without_vnni", "changed": changed}) for row in found.rows]
    elsewhere = found.model_copy(update={"rows": rows})
    altered = report.model_copy(
        update={"quantization": report.quantization.model_copy(update={"elsewhere": elsewhere})}
    )
    page = render_summary(altered, Path("out"))
    (line,) = [line for line in page.splitlines() if line.startswith("WARNING")]
    assert line.startswith(f"WARNING  {SETTINGS['without_vnni']}: 9 (6.00%, at most 11.00%) of the labels change")
    assert "--reduce-range leaves 0 overflows" in line
    assert "WARNING" not in render_summary(report, Path("out"))
