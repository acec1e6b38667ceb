"""Places, starts, restarts and ends the processes of a cluster through Ray.

Knows: Ray, the keeper's command line, the worker's and the frontend's server objects.
Must not know: requests. Nothing here is on the path of one.
"""
