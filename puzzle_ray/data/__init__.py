"""Text to token batches: where it comes from, how it is tokenised and packed, in which order it is read.

`files` finds files, `sources` checks and identifies them, `formats` reads their bytes, `columns` takes the text out of a row,
`documents` joins these, `mixture` mixes the documents of several sources, `blocks` cuts text into blocks and tokenises one, `tokenising`
says which text goes to which split, `shards` keeps and reads the tokens of blocks, `splits` those of a run, `parts` splits held-out text,
`order` is the order of training: a pure function of (seed, number). `foreign` turns what other libraries raise into errors of ours.
May import: the ground.
"""
