"""What a learning rate does to a run, as a page for people who do not know the theory."""

from eomdl.reports.finding import Finding, Table
from eomdl.reports.written import Report, report


__all__ = ["Finding", "Report", "Table", "report"]
