"""What people run: ``vllm-mm`` and its benchmarks."""
