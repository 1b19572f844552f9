"""What an operator sees: metrics and the access log. Cheap enough to be always on."""

from core.observe.access import AccessLog
from core.observe.histogram import LoopHistogram
from core.observe.metrics import LoadSource, Metrics

__all__ = ["AccessLog", "LoadSource", "LoopHistogram", "Metrics"]
