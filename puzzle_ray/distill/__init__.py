"""Training: blocks one at a time (BLD), then the whole child (GKD)."""
