"""SGLang's HiCache keeps its pages in our store (`--hicache-storage-backend dynamic`).

`backend` is the class that SGLang loads and the only module here that imports it; `store` does
the work over host pools as SGLang hands them over, `identity` says what a page's key has to
carry, `pools` which lengths of a prefix can be restored. Knows nothing of GPUs or of other
engines, and never raises into the engine for what the cache did.
"""
