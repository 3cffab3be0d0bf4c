"""Share a run among processes; interrupt and resume it."""
