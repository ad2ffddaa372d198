"""Where pairs come from: tokenizers, files, statements, and batches of token arrays."""
