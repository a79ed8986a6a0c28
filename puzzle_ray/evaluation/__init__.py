"""Evaluation of whole children against their parent: predictions on held-out text, measured speed, answers to questions, samples.

`evaluate.py` compares finished models and times them. `quality.py` asks them: `requests.py` says what, `reader.py` answers, `tasks.py` and
`retained.py` compare; `question_files.py` reads questions; `harness.py` is lm-evaluation-harness, and the only file that imports it.
`child_meter.py` measures children that are put together in memory from a library. May import: the ground, data, models, scoring,
profiling, serving, distill's library.
"""
