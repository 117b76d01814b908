"""Pure tensor functions: no model, no state. Every formula of the library lives here once.

attention: rows and column means of attention, rebuilt from queries and keys. similarity: cosine. budget: counts, and how they
are shared. selection: which tokens stay. matching: who merges with whom. merging: a decision becomes a `Reduction`. grid: cells
of a picture. squares: square grids of features, pooled and resized. flops: what it costs.
"""
