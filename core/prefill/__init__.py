"""Prefill on another worker: the decision, the queue, and the session that drives both sides to one end."""
