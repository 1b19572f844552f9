"""Aggregated serving: every worker prefills and decodes."""

from dynamo import Frontend, Processor, Worker

Frontend.link(Processor).link(Worker)
