"""Which tensors write to the residual stream, and how."""
