"""A monitor of any training loop: is the run at the edge of stability, in which block, and what do its finite steps do?"""

from eomdl.telemetry.edge_report import EdgeReport
from eomdl.telemetry.edge_telemetry import EdgeTelemetry


__all__ = ["EdgeReport", "EdgeTelemetry"]
