"""Load what `--data` names; data are read a slice at a time."""
