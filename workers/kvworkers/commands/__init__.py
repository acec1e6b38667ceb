"""Commands of the serving side: up, down, chat, demo, model.

Knows: click, terminals, the rooms of kvworkers. Modules here import engines lazily,
so that `kvstore --help` stays quick. Must not be known by any other room.
"""
