"""The few values that a dry GPU carries, and what it assumes of the others."""
