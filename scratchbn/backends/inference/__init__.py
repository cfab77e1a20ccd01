"""A second graph for inference, on the same Parameters.

The graph of a layer serves training and inference, so it computes what only one of them needs. A
net that only infers runs another one, in which a layer is::

    convolution(x, W, bias - running_mean)        the shift, in the bias of what is before it
    depthwise 1x1 convolution(., factor, beta)    factor = gamma / sqrt(running_var + epsilon)

and the factors of all layers are computed at once, each time the graph runs. No value is copied,
so none can be stale: ``calls`` finds the layers in a graph, ``rewrite`` puts the two operators in
their place, ``two_graphs`` runs a live net by one graph or the other, and ``switch`` turns that
off. ``scratchbn.deploy`` rewrites files the same way.
"""
