"""Parts of the language models other than the recurrent core."""
