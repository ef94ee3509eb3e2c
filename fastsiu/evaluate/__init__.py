"""Metrics, probes and attacks: pure functions over answers and log-probabilities."""
