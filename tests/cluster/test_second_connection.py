"""A second connection to a store, with torch's `Store.clone` and without it (torch 2.11)."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_doremi.cluster.store import second_connection


class StoreWithoutClone(dist.TCPStore):
    """A store as in torch 2.11."""

    @property
    def clone(self):
        raise AttributeError("clone")


@pytest.mark.parametrize("store_type", [dist.TCPStore, StoreWithoutClone])
def test_both_connections_share_their_keys(store_type):
    store = store_type("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10), wait_for_workers=False)
    other = second_connection(store)
    assert other is not store
    other.set("key", "value")
    assert store.get("key") == b"value"


def test_a_store_in_memory_is_shared():
    store = dist.HashStore()
    second_connection(store).set("key", "value")
    assert store.get("key") == b"value"
