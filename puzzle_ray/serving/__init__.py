"""Serving a model behind OpenAI's API: continuous batching on the model's plain forward, sampling, and the protocol.

engine          what callers use: submit requests, read their tokens, counters
scheduler       which requests a forward pass serves; waiting, sequences: requests before and in it
rows, slots     the model with its key-value cache within a budget; masks, prefixes: attention masks, beginnings that requests share
without_cache   text from a model whose layers lie in shards, which keeps no keys and values
choosing        tokens from logits; sampling: a request's settings
output, text    from tokens to text, on a thread of its own; generation: what a caller holds
requests, prompts, answers, api_errors, openai_api   the protocol, without a web framework
access, metrics, settings, limits, fetch             keys and bodies, Prometheus, a server's settings, lengths and memory, models

Nothing here depends on an HTTP server or on Ray.
May import: the ground, surgery, models.
"""
