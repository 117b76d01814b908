"""Decoding with fewer forwards of the target model: one file per system, named by its id.

A system drafts several tokens as a tree; one forward of the target checks them all. `_common.py` holds what they share: the tree,
its forward, the acceptance rules and the commit of the accepted path to the cache.
"""
