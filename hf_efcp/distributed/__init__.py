"""Several processes: placements of parameters and state, the plan that divides state, messages, and folders of checkpoints."""
