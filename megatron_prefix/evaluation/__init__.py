"""Greedy or sampled answers through the servers, scored: beside training and by ``eval``."""
