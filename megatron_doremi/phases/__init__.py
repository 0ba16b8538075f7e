"""The phases of the program: train, score, evaluate."""
