"""The OpenAI-compatible HTTP surface: requests in, tokens to the engine, text back. Knows no graph and no engine."""

from core.messages import DeadlineExceeded, Unavailable
from core.openai.app import create_app
from core.openai.backend import Backend
from core.openai.card import ModelCard
from core.openai.generation import Generate
from core.openai.pipeline import Pipeline
from core.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from core.openai.responses import Model, ModelList, Text, Tokens
from core.openai.server import HttpServer
from core.openai.settings import HttpSettings, PipelineSettings

__all__ = [
    "Backend",
    "ChatRequest",
    "CompletionRequest",
    "DeadlineExceeded",
    "DetokenizeRequest",
    "Generate",
    "HttpServer",
    "HttpSettings",
    "Model",
    "ModelCard",
    "ModelList",
    "Pipeline",
    "PipelineSettings",
    "Text",
    "TokenizeRequest",
    "Tokens",
    "Unavailable",
    "create_app",
]
