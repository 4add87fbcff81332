"""The `fastvit` command, one file a subcommand."""
