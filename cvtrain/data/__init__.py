"""Data sets and loaders; the `data` group."""
