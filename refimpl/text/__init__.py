"""Text to token ids and back: tokenizers from files, streaming decoding."""
