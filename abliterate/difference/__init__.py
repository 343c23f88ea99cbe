"""What differs between two checkpoints, how, and what kind of edit that is: streamed, whoever made them."""
