"""Does the split change anything? The same module on 1, 2, 3 ... ranks, compared number by number.

    from xdist.certify import certify

    report = certify(make_module, vocab_size=256, length=1000, ranks=(1, 2, 3))
    print(report.table())
    report.raise_if_failed()

`xdist certify CONFIG` does this for the model of a config file. See docs/certify.md.
"""

from __future__ import annotations

from xdist.certify.command import certify_config
from xdist.certify.grids import certify_grids
from xdist.certify.judge import Finding, Report, Row
from xdist.certify.measure import Request
from xdist.certify.run import certify

__all__ = ["Finding", "Report", "Request", "Row", "certify", "certify_config", "certify_grids"]
