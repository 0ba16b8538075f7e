"""What a run will cost and repeat, known before it starts."""
