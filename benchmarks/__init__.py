"""Speed and memory of the loss against its peers; installed as `wmtp.benchmarks`."""
