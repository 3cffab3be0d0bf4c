"""What lets a run be shared by processes, interrupted and resumed."""
