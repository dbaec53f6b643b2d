"""What the language models are built from, besides the relational memory core."""
