"""What a step's tokens count for and what they showed: weights, sums, KL, agreement."""
