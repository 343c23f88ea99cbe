"""What a bug report should say about an installation and its machine, and what is wrong with them."""
