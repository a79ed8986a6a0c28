"""What subblocks cost on the target. An engine is one file here that defines `ENGINE`."""
