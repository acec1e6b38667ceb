"""How bytes cross between processes: the arena's mapping, session sockets, bulk sockets.

Knows: shared memory, slot words as stored, descriptors over Unix sockets.
Must not know: which block is worth keeping, or who may read it.
"""
