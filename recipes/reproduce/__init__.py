"""One runner for all training experiments: specs in files, results as JSON lines, tables and plots made from the results."""
