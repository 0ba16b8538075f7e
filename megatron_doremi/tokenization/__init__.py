"""Tokenizers: text to ids and back, and what they lose."""
