"""Rounds of DoReMi: the weights of a round are the sampling weights of the next round's reference."""
