"""Disaggregated serving with a router: requests go to the Worker that holds their beginning and has time."""

from dynamo import Frontend, PrefillWorker, Processor, Router, Worker

Frontend.link(Processor).link(Router).link(Worker).link(PrefillWorker)
