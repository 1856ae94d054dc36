"""What ``megatron-prefix advise`` makes of full-length rollouts. Pure."""
