"""What `--data` names, read a slice at a time."""
