"""A run's health: ranks that hang, slow phases, alarms of probes, Prometheus."""
