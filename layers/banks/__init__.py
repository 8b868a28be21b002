"""Memory banks: blocks of memory, one for every node of a tree, in memory or on disk."""
