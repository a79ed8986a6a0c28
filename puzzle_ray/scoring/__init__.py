"""How much a replaced block damages the parent."""
