"""Aggregated serving with a router: requests go to the worker that holds their beginning and has time."""

from dynamo import Frontend, Processor, Router, Worker

Frontend.link(Processor).link(Router).link(Worker)
