"""SGLang keeps its pages in our store: behind its HiCache, or directly behind its device pools.

`backend` and `linker` are the classes that SGLang loads, the only modules here that import it;
`store` does the work over host pools, `direct` over device pools (`device`, told layer by layer in
`layers`); `identity` says what a page's key has to carry, `pools` which lengths can be restored.
Knows nothing of other engines, and never raises into the engine for what the cache did.
"""
