"""Models: from a directory to logits over paged K and V.

Knows: transformers, `kvkernels.ops`, files. Must not know: requests, scheduling, the store's
processes. `provision` makes a directory, `digest` identifies it, `spec` reads what it is,
`loading` runs it, `attention` is what transformers calls in every layer. Nothing is imported
here: preparing a model must not wait for torch.
"""
