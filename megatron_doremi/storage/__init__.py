"""Durable files and what is in them: atomic writes, checked JSON, tensor files, folder locks."""
