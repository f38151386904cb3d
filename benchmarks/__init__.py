"""Benchmarks, and the direct loop they measure against."""
