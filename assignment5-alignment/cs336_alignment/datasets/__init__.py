"""Data: questions, demonstrations and preference pairs from files, packed sequences, and answers in responses."""
