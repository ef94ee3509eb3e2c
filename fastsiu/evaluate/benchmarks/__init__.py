"""Other people's benchmarks: one file a set reads it and has its metrics under its own names; `run`
asks a model."""
