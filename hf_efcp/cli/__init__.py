"""The command line: `hf-efcp`."""
