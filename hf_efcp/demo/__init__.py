"""Data and models for the recipes that need no download, and what the recipes' beginnings and ends have in common."""
