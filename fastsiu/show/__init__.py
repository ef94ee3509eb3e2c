"""What the terminal shows: tables, samples, sentences."""
