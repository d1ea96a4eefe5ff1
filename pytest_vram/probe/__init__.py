"""Probes: they measure the memory of a device, and record which code allocated it."""
