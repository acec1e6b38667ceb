"""vLLM uses a cache node as its external KV tier, by configuration alone (docs/engines/vllm.md).

Only `connector`, `stats`, `tier` and modules that begin with `engine_` import vLLM. What decides
(`plan`), what names (`identity`), what converts (`pages`) and what talks to the node (`link`,
`scheduler_side`, `worker_side`, `layer_loads`) run and are tested without it.
"""
