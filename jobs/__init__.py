"""Entry points, one verb each: `python -m jobs.<verb>` or `puzzle-ray <verb>`."""
