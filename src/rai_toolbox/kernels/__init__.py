"""The layer below the mathematics: what depends on the machine that a tensor lies on."""
