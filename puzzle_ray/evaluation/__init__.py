"""What was kept and what was gained: parent and children side by side, and whole children measured one after the other.

Predictions on held-out text, measured speed, answers, samples.
May import: the ground, models, scoring, profiling, distill's library.
"""
