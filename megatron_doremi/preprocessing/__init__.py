"""From raw text to indexed data sets: what the tools use, and training does not."""
