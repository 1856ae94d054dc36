"""What a run was started as, on a cluster or here: its jobs, its logs, what Slurm says of it."""
