"""The five services of every graph."""

from core.components.aliases import engine_aliases
from core.components.frontend import Frontend
from core.components.prefill_worker import PrefillWorker
from core.components.processor import Processor
from core.components.router import Router
from core.components.worker import Worker

__all__ = ["Frontend", "PrefillWorker", "Processor", "Router", "Worker", "engine_aliases"]
