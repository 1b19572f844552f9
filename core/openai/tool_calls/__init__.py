"""Tool calls in the formats that models write them in. `formats.py` has the table; add a format there."""

from core.openai.tool_calls.formats import FORMATS, ToolCallFormat, detect, register

__all__ = ["FORMATS", "ToolCallFormat", "detect", "register"]
