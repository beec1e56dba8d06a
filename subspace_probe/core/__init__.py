"""The nouns and the protocols. Axis names, everywhere: batch pos d_model head k n d_vocab."""
