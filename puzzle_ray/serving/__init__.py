"""Serving a model behind OpenAI's API: continuous batching on the model's plain forward, sampling, and the protocol.

Nothing here depends on an HTTP server or on Ray.
May import: the ground, surgery, models.
"""
