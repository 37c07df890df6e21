"""The YAML of every verb (top level) and of every group's options (folders), as package data."""
