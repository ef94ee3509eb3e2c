"""Other people's benchmarks. Each has a file that reads it and computes its metrics, under its own
names; `run` asks a model."""
