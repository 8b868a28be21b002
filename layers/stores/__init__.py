"""Stores for tokens outside of a layer's state: in host memory, the best few, or on disk."""

from memzoo.layers.stores.disk import DiskStore
from memzoo.layers.stores.host import HostStore
from memzoo.layers.stores.store import Entries, MemoryStore
from memzoo.layers.stores.top_k import TopKStore

__all__ = ["DiskStore", "Entries", "HostStore", "MemoryStore", "TopKStore"]
