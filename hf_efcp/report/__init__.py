"""A training run as a page: what its folder says, what to change next, figures, HTML."""
