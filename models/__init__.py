"""Example networks that take any normalization layer; a wheel carries LeNet, for its demo."""
