"""Data sets to a resumable, seeded, sharded stream of prompts, and who writes a step's prefixes."""
