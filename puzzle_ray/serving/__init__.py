"""A model behind OpenAI's API: continuous batching on the model's plain forward, sampling, and the protocol.

Nothing here knows of HTTP servers or Ray.
May import: the ground, surgery, models.
"""
