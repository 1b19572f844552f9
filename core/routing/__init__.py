"""Decides which worker gets a request, from what their caches hold and from how busy they are."""
