"""The eight benchmarks of the LASER paper (arXiv 2312.13558) as tasks of the harness."""
