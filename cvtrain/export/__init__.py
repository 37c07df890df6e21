"""Files to deploy; the `export` group."""
