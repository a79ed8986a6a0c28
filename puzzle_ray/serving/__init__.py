"""Serving a model: a continuous-batching engine and the OpenAI-shaped requests it answers."""
