"""How good a checkpoint is on a text, and what it does there: perplexity, drafts, routing."""
