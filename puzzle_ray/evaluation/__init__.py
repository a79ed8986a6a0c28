"""Evaluation of whole children against their parent: predictions on held-out text, measured speed, answers to questions, samples.

`evaluate.py` compares finished models. `child_meter.py` measures children that are put together in memory from a library.
May import: the ground, models, scoring, profiling, distill's library.
"""
