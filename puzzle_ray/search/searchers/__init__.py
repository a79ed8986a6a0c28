"""Searchers: one file each, which declares `SEARCHER`. Nothing else is in this folder.

What a searcher must do: see `puzzle_ray.search.searcher.Searcher`.
May import: `search`.
"""
