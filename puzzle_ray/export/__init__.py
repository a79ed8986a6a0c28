"""Children as files other programs can read."""
