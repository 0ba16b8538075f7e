"""The GPT and its form as DeepSpeed pipeline layers."""
