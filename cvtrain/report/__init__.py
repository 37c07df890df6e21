"""What a person reads: console, tables, pictures."""
