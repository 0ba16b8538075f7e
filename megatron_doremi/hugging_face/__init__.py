"""Hugging Face's model folders: reading, writing, and the map between their parameters and this program's."""
