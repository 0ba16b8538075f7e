"""Values travel between ranks as JSON, whatever their lengths and whoever sends.

Run alone: python -m pytest tests/parallel/test_exchange.py
"""

from __future__ import annotations

from ranks import on_ranks


def exchange(launch):
    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.parallel.exchange import broadcast_json, gather_json

    join(launch)
    everyone = gather_json({"rank": launch.rank, "text": "\u00e4" * 1000 * launch.rank})
    last = launch.world_size - 1
    return everyone, broadcast_json(["from", launch.rank, 0.1], last), broadcast_json(None)


def test_values_of_all_ranks_in_order():
    for world in (1, 3):
        expected = [{"rank": rank, "text": "\u00e4" * 1000 * rank} for rank in range(world)]
        for everyone, last, nothing in on_ranks(world, exchange):
            assert everyone == expected
            assert last == ["from", world - 1, 0.1]
            assert nothing is None
