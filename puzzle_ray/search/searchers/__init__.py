"""Ways to choose, one file each that declares `SEARCHER`. Nothing else is here.

What a searcher must do: `puzzle_ray.search.searcher.Searcher`.
May import: `search`.
"""
