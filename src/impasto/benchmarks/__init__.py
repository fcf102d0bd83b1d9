"""Benchmarks that run without a hub: harness YAML over fetched data, and a few dozen items of our own for tests."""
