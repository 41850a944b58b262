"""`hf-efcp bench`: times of optimizer steps, against each other and against what the machine could do."""
