"""What a graph needs and eager code does not.

A hybridized block runs its Python once, on symbols whose rank and size are unknown, and replays
the recorded graph ever after. Four things therefore cannot be written the plain way:

- asking ``autograd.is_training()``: ``mode`` asks when the graph runs;
- reading and writing a Parameter: ``state`` makes both part of the graph, in order;
- looking at ``x.shape``: ``view`` finds the channels of an input of any rank;
- looking at ``x.dtype`` or ``x.context``: ``trace`` infers them from what the trace began with.

Everything here takes arrays and symbols alike, so that its callers need not know which.
"""
