"""Rank arithmetic, collectives with gradients, tensor parallel layers."""
