"""The benchmarks of every op as a command: ``rlhf-fast bench``; CONTRIBUTING.md says what a module here holds."""

from rlhf_fast.bench.suite import BenchConfig, bench

__all__ = ["BenchConfig", "bench"]
