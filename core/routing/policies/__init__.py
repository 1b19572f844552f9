"""Routing policies, one a file. `core.routing.registry` finds them by name."""
