"""The operators between the public losses and the backends: records in, records out."""
