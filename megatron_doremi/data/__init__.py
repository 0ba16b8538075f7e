"""Indexed datasets, the manifest of domains, and the blend that says which window is sample n."""
