"""Text to token batches: where it comes from, how it is tokenised and packed, in which order it is read.

`files` finds files, `formats` reads their bytes, `columns` takes the text out of a row, `documents` joins the three, `tokenising`
packs tokens, `parts` splits held-out text, `order` is the order of training: a pure function of (seed, number).
May import: the ground.
"""
