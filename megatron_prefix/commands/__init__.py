"""What each command of ``megatron-prefix`` takes and does; ``cli.py`` names them all."""
