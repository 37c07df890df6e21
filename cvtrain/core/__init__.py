"""What every layer shares: batches, counter-based randomness, preprocessing, ranks."""
