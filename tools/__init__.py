"""The command-line tools, each a program of its own. `pip install` makes this folder megatron_doremi.tools."""
