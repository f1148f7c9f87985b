"""sdfast under a model that is there already: `optimize`, `restore`, `explain`, `disabled`."""

from sdfast.drop_in.layers import disabled
from sdfast.drop_in.replace import explain, optimize, restore
from sdfast.drop_in.report import Report, Row

__all__ = ["Report", "Row", "disabled", "explain", "optimize", "restore"]
