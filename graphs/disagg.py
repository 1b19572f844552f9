"""Disaggregated serving: PrefillWorkers compute long prompts, Workers decode."""

from dynamo import Frontend, PrefillWorker, Processor, Worker

Frontend.link(Processor).link(Worker).link(PrefillWorker)
