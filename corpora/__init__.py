"""Where texts come from and how they are written: downloads, and the punctuation of tokenized text."""
