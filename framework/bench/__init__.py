"""The one benchmark harness: of the `bench` command, and of the scripts in benchmarks/."""
