"""Everything that runs on Ray. Importing this package, or `cluster.train` for a run without workers, does not load Ray."""
