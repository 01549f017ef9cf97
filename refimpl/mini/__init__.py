"""The embedded trained model: its recipe, its weights and the texts it is judged on.

A small model of exactly the published architecture, trained from nothing on Python's standard
library.  `bf16/` holds the weights in the published layout; the modules beside it are the recipe
that made them, in the order in which they run:

    corpus -> tokenizer -> streams -> torch_model -> train -> train_mtp -> export -> evaluate

Nothing is imported here; only the training modules need torch (the optional extra `train`).
"""
