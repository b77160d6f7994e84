"""What people run: training runs, generation, comparison, benchmarks. Built on fgpt's public names."""
