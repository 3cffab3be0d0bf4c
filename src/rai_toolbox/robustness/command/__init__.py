"""The command: options and config files, what a terminal shows, exit codes."""
