"""Puts Disout into a network that knows nothing of it: attach(model, where, ...) gives a Handle that takes it out.

hooks.py is `attach` and what it puts into a network; readers.py finds which weight reads a map, in the network's graph
(graph.py), by what is known of its values (values.py).
"""

from disout_attach.hooks import Handle, Hook, attach

__all__ = ["Handle", "Hook", "attach"]
