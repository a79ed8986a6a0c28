"""Text to token batches: where it comes from, how it is tokenised and packed, in which order it is read.

The order is a pure function of (seed, number).
May import: the ground.
"""
