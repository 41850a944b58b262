"""What runs when a Python starts, long before it trains: the names in programs that do not import hf_efcp."""
