"""The page of `launch.report`: HTML with inline SVG that stands alone, light or dark as the reader's system is.

Charts are drawn by `launch.charts`; the page's script only adds read-outs under the pointer. All text that comes from
documents, files or the command line goes through `escape`.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from launch import charts
from launch.report.curves import curves_section, difference_section
from launch.report.run import Run
from launch.report.samples import Sample, samples_sections
from launch.report.selection import selection_section
from launch.report.tables import alarms_section, config_section, goodput_section, result_section


def render(runs: Sequence[Run], baseline: Run, samples: Sequence[Sample] | None = None) -> str:
    """The whole page; `baseline` is one of the runs, `samples` has one for each."""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    sections = [
        f"<p class=note>Written {when}, from the files of {len(runs)} run{'s' if len(runs) > 1 else ''}.</p>",
        result_section(runs),
        curves_section(runs),
        difference_section(runs, baseline),
        config_section(runs),
        goodput_section(runs),
        alarms_section(runs),
        selection_section(runs),
        *(samples_sections(runs, samples) if samples is not None else []),
    ]
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    return template.replace("@PALETTE@", charts.palette()).replace("@SECTIONS@", "\n".join(filter(None, sections)))
