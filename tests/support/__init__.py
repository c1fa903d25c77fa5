"""What several tests share: cases and the truth, tiny runs, generated cases, faults."""
