"""Tasks that this project makes itself, with their data, tokenizers and models."""
