"""Values of any length are exchanged between ranks as JSON, from any source rank.

Run alone: python -m pytest tests/parallel/test_exchange.py
"""

from __future__ import annotations

from ranks import on_ranks


def exchange(launch):
    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.parallel.exchange import broadcast_json, gather_json

    join(launch)
    gathered = gather_json({"rank": launch.rank, "text": "\u00e4" * 1000 * launch.rank})
    last = launch.world_size - 1
    return gathered, broadcast_json(["from", launch.rank, 0.1], last), broadcast_json(None)


def test_gather_returns_values_in_rank_order_and_broadcast_that_of_the_source():
    for world in (1, 3):
        expected = [{"rank": rank, "text": "\u00e4" * 1000 * rank} for rank in range(world)]
        for gathered, from_last, none in on_ranks(world, exchange):
            assert gathered == expected
            assert from_last == ["from", world - 1, 0.1]
            assert none is None
