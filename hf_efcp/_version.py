"""The version, alone in a file that setup.cfg can read without importing torch."""

__version__ = "0.2.0"
