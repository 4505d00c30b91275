"""What a model and a workload need on a given machine, before anything is served. Pure."""
