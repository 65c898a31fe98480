"""Where the runs of a study run: one launcher a file."""
