"""The model: a small Linux memory-management kernel in numpy. See ARCHITECTURE.md for its rooms."""
