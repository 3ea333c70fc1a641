"""The built-in model and its parts."""
