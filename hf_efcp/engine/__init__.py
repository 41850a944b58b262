"""The engine: what all methods share, from the gradient to the updated parameter. Plain torch."""
