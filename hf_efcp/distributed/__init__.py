"""State divided among processes: who owns what, and what they tell each other. Plain torch.distributed."""
